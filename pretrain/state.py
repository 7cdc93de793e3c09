"""Where a run stands, and what a checkpoint says about the run that saved it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline import difference
from data_pipeline.errors import UserError

from .checkpoint import read_state
from .config import Config
from .data import RunData, check_epochs
from .distributed import Distributed
from .run_folder import plain, versions

FORMAT = 1


@dataclass(frozen=True)
class TrainState:
    """Progress of a run; with the weights and the optimizer it is all that a resume needs (law 1)."""

    step: int = 0
    """Optimizer steps done."""
    position: int = 0
    """Sequences consumed: the whole state of the data."""
    holes: int = 0
    """Sequences without a label so far."""
    evaluated: bool = False
    """The evaluation that is due at this step has been made."""

    def advance(self, sequences: int, holes: int) -> TrainState:
        """After one more optimizer step over ``sequences`` sequences."""
        return replace(
            self,
            step=self.step + 1,
            position=self.position + sequences,
            holes=self.holes + holes,
            evaluated=False,
        )


def checkpoint_state(state: TrainState, config: Config, data: RunData, ranks: Distributed) -> dict[str, Any]:
    """The content of a checkpoint's ``state.json``."""
    return {
        "format": FORMAT,
        **asdict(state),
        "data": data.identity,
        "model": _model(config, data),
        "topology": _topology(config, ranks),
        "config": plain(config),
        "versions": versions(),
    }


def resume_state(path: Path, config: Config, data: RunData, ranks: Distributed) -> TrainState:
    """The progress that a checkpoint holds, if this run can go on from it.

    Raises:
        UserError: the checkpoint is of another model, of other data or another order, or of a topology from which this
            one can't be restored; the message says what differs.
        DataError: ``state.json`` can't be read.
    """
    saved = read_state(path)
    if saved.get("format") != FORMAT:
        raise UserError(
            f"{path} has the checkpoint format {saved.get('format')!r}, this version reads {FORMAT}. Resume with the "
            f"version that wrote it ({saved.get('versions', {}).get('headrace', 'unknown')})."
        )
    _same(
        "the model or its optimizer",
        path,
        saved["model"],
        _model(config, data),
        "Give its settings back, or choose another run.name",
    )
    _same_data(path, saved["data"], data.identity)
    there, here = saved["topology"], _topology(config, ranks)
    if there["zero_stage"] == here["zero_stage"] == 0:
        there = {**there, "world_size": here["world_size"]}  # stage 0 shards nothing
    _same("the topology", path, there, here, "This version resumes on the topology that saved; start that one again")
    state = TrainState(**{name: saved[name] for name in TrainState.__dataclass_fields__})
    _check_end(path, config, data, state)
    return state


def config_changes(path: Path, config: Config) -> list[str]:
    """The settings of the run that differ from those a checkpoint was saved with, as ``key: old -> new``."""
    there, here = (_flat(content) for content in (read_state(path)["config"], plain(config)))
    keys = sorted(key for key in there.keys() | here.keys() if not key.startswith(("run.", "resume")))
    return [f"{key}: {there.get(key)!r} -> {here.get(key)!r}" for key in keys if there.get(key) != here.get(key)]


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def end_position(config: Config, state: TrainState) -> int:
    """The position at which the run will be done: another global batch may have been in force so far."""
    return state.position + max(0, config.total_steps - state.step) * config.training.global_batch


def _check_end(path: Path, config: Config, data: RunData, state: TrainState) -> None:
    check_epochs(config, data.order, end_position(config, state))
    if config.training.tokens is not None and state.position != state.step * config.training.global_batch:
        raise UserError(
            f"{path} has consumed {state.position} sequences in {state.step} steps, not training.global_batch = "
            f"{config.training.global_batch} a step, so training.tokens does not say how many steps are left. Give "
            "training.steps instead."
        )


def _model(config: Config, data: RunData) -> dict[str, Any]:
    layout = {
        "optimizer.name": config.optimizer.name,
        "optimizer.decay_norms_and_embeddings": config.optimizer.decay_norms_and_embeddings,
    }
    vocabulary = config.model.resolve_vocab_size(data.tokenizer.vocab_size)
    return {**plain(config)["model"], "vocab_size": vocabulary, **layout}


def _topology(config: Config, ranks: Distributed) -> dict[str, Any]:
    return {
        "world_size": ranks.world_size,
        "zero_stage": config.engine.zero_stage,
        "offload_optimizer": config.engine.offload_optimizer,
        "precision": config.training.precision,
    }


def _same(what: str, path: Path, there: dict[str, Any], here: dict[str, Any], mend: str) -> None:
    changes = [
        f"{key}: {there.get(key)!r} in the checkpoint, {here.get(key)!r} now"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    if changes:
        raise UserError(f"{path} can't be resumed: {what} differs ({'; '.join(changes)}). {mend}.")


def _same_data(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    mend = "Give the data settings back, or choose another run.name"
    changed = difference(there["order"], here["order"])
    if changed:
        raise UserError(f"{path} can't be resumed: the order of the data differs ({changed}). {mend}.")
    others = [{key: value for key, value in side.items() if key != "order"} for side in (there, here)]
    _same("the data", path, others[0], others[1], mend)
