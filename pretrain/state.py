"""Where a run stands, and what a checkpoint says about the run that saved it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline import difference
from data_pipeline.errors import UserError

from .checkpoint import read_state
from .config import Config
from .data import RunData, check_end
from .distributed import Distributed
from .objective import LossRange, StepStatistics
from .run_folder import plain, versions
from .stability.rollbacks import Range, ahead, merged, read_rollbacks

PLACES = {"run.name", "run.folder", "resume"}
"""Settings that say where a run lies, and from where it goes on, not what it is."""

FORMAT = 5
"""5: what decisions on later steps hang on (``skips``, ``losses``), ``skipped``, and ``left_out``."""


@dataclass(frozen=True)
class TrainState:
    """Progress of a run; with the weights and the optimizer it is all that a resume needs (law 1)."""

    step: int = 0
    """Optimizer steps done."""
    position: int = 0
    """Where the next step begins in the order: the whole state of the data."""
    holes: int = 0
    """Sequences that were missing so far."""
    dropped: int = 0
    """Sequences left out so far because their loss was not finite."""
    loss_range: LossRange | None = None
    """What a one-pass group of reweighting needs of the step before; to the bit."""
    expert_frequencies: dict[str, list[list[float]]] | None = None
    """What losses on routers need of the steps before; to the bit."""
    evaluated: bool = False
    """The evaluation that is due at this step has been made."""
    data_changes: tuple[str, ...] = ()
    """What was different about the data, and from which step on, each time that ``data.accept_change`` let it be."""
    skipped: int = 0
    """Steps so far whose update was not made."""
    skips: tuple[int, ...] = ()
    """The last of them, as far back as ``stability`` looks; steps count from 1."""
    losses: tuple[float, ...] = ()
    """Of the last steps whose update was made, as many as ``stability`` looks at; to the bit."""
    left_out: tuple[tuple[int, int], ...] = ()
    """Positions [start, stop) that rollbacks of this run have left out beside ``data.skip_ranges``, ascending."""

    def advance(self, next_position: int, statistics: StepStatistics, remembered: int) -> TrainState:
        """After one more optimizer step; ``remembered`` losses are kept."""
        losses = (*self.losses, statistics.loss)
        return replace(
            self,
            step=self.step + 1,
            position=next_position,
            holes=self.holes + statistics.holes,
            dropped=self.dropped + len(statistics.dropped),
            loss_range=statistics.loss_range,
            expert_frequencies=statistics.routing.frequencies if statistics.routing else None,
            losses=losses[-remembered:] if remembered else (),
            evaluated=False,
        )

    def skip(self, next_position: int, holes: int, window: int) -> TrainState:
        """After a step without an update: it counts as a step, its positions and ``holes`` are consumed, and all else
        is as if it had not been; the skips of the last ``window`` steps are kept."""
        skips = (*self.skips, self.step + 1)
        return replace(
            self,
            step=self.step + 1,
            position=next_position,
            holes=self.holes + holes,
            skipped=self.skipped + 1,
            skips=tuple(step for step in skips if step > self.step + 1 - window),
            evaluated=False,
        )


def checkpoint_state(state: TrainState, config: Config, data: RunData, ranks: Distributed) -> dict[str, Any]:
    """The content of a checkpoint's ``state.json``."""
    return {
        "format": FORMAT,
        **asdict(state),
        "data": data.identity,
        "skip_ranges": [list(skipped) for skipped in _skipped_before(config.data.skip_ranges, state.position)],
        "model": _model(config, data),
        "topology": _topology(config, ranks),
        "config": plain(config),
        "versions": versions(),
    }


def resume_state(path: Path, config: Config, data: RunData) -> TrainState:
    """The progress that a checkpoint holds, if this run can go on from it.

    ``data_changes`` has one more entry than the checkpoint's where ``data.accept_change`` lets other data be.

    Raises:
        UserError: the checkpoint is of another model, of other data or another order, of other skipped ranges before
            its position, or of another precision; the message says what differs.
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
    change = _accepted_change(path, config, saved, data.identity)
    _same_precision(path, saved["topology"]["precision"], config.training.precision)
    state = TrainState(**{name: saved[name] for name in TrainState.__dataclass_fields__})
    loss_range = LossRange(**saved["loss_range"]) if saved["loss_range"] else None
    kept = tuple((start, stop) for start, stop in state.left_out)
    state = replace(state, skips=tuple(state.skips), losses=tuple(state.losses), left_out=kept)
    changes = [*state.data_changes, *([f"from step {state.step + 1} on: {change}"] if change else [])]
    state = replace(state, loss_range=loss_range, data_changes=tuple(changes))
    _check_skipped(path, config, state, saved["skip_ranges"])
    _check_end(path, config, data, state)
    return state


def rewound_state(path: Path, config: Config, data: RunData) -> TrainState:
    """The state of a run that begins at the step and position of another run's checkpoint, with nothing behind it.

    Raises:
        UserError: the checkpoint's position means other samples in this run, or lies beyond its end.
        DataError: ``state.json`` can't be read.
    """
    saved = read_state(path)
    sides = (saved["data"], data.identity)
    others = [{key: value for key, value in side.items() if key != "order"} for side in sides]
    orders = [side["order"] for side in sides]
    if changed := difference(orders[0], orders[1], saved["position"]) or _differences(*others):
        raise UserError(
            f"training.rewind: {path} stands at position {saved['position']} of other data than this run's ({changed})."
            " Give that run's data settings, or rewind=false."
        )
    state = TrainState(step=saved["step"], position=saved["position"])
    if state.step >= config.total_steps:
        raise UserError(
            f"training.rewind: {path} stands at step {state.step}, and the run has only {config.total_steps} steps. "
            "Rewind to an earlier checkpoint, or raise training.steps."
        )
    _check_skipped(path, config, state, saved["skip_ranges"])
    _check_end(path, config, data, state)
    return state


def config_changes(path: Path, config: Config) -> list[str]:
    """The settings of the run that differ from those a checkpoint was saved with, as ``key: old -> new``."""
    there, here = (_flat(content) for content in (read_state(path)["config"], plain(config)))
    keys = sorted((there.keys() | here.keys()) - PLACES)
    return [f"{key}: {there.get(key)!r} -> {here.get(key)!r}" for key in keys if there.get(key) != here.get(key)]


def topology_changes(path: Path, config: Config, ranks: Distributed) -> list[str]:
    """What is different about the topology from that which saved a checkpoint, as ``key: old -> new``."""
    there, here = read_state(path)["topology"], _topology(config, ranks)
    there = {"expert_parallel": 1, **there}  # what was saved before there was a choice
    return [f"{key}: {there[key]} -> {here[key]}" for key in here if there[key] != here[key]]


def group_change(path: Path, config: Config, ranks: Distributed) -> str | None:
    """What another number of ranks or micro-batch does to the objective since a checkpoint; None: nothing."""
    saved = read_state(path)
    there = saved["config"]["training"]["micro_batch"] * saved["topology"]["world_size"]
    here = config.training.micro_batch * ranks.world_size
    reweighting = config.objective.reweighting
    if there == here or reweighting.off or reweighting.group != "micro_step":
        return None
    return (
        f"samples are weighed against each other in groups of {here} (training.micro_batch x ranks), which were of "
        f"{there} before: the objective is another one. Keep the product, or set objective.reweighting.group to a "
        "global batch's, to be independent of it."
    )


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def left_out(config: Config, origin: Path | None) -> tuple[Range, ...]:
    """The positions that the run of ``config`` has left out by itself, where it goes on from a checkpoint (None: begins
    anew): those that stand there, and those of rollbacks to before its end.

    Raises:
        UserError, DataError: a file that says so is damaged.
    """
    saved: dict[str, Any] = read_state(origin) if origin else {"position": 0}
    ranges = [(start, stop) for start, stop in saved.get("left_out", [])]
    pending = ahead(read_rollbacks(config.run_folder), saved["position"])
    return merged([*ranges, *((rollback.start, rollback.stop) for rollback in pending)])


def leaving_out(config: Config, ranges: tuple[Range, ...]) -> Config:
    """The configuration with these positions among ``data.skip_ranges``."""
    if not ranges:
        return config
    skipped = merged([*config.data.skip_ranges, *ranges])
    data = config.data.model_copy(update={"skip_ranges": skipped})
    # made anew, for a copy would keep the batch plan that it has worked out
    return Config(**{**{name: getattr(config, name) for name in Config.model_fields}, "data": data})


def end_position(config: Config, state: TrainState) -> int:
    """The position at which the run will be done: another global batch may have been in force so far."""
    return config.batch_plan.advance(state.step, state.position, config.total_steps)


def _check_end(path: Path, config: Config, data: RunData, state: TrainState) -> None:
    check_end(config, data.order, end_position(config, state))
    plan = config.batch_plan
    consumed, planned = (plan.sequences_before(each) for each in (state.position, plan.start_of(state.step)))
    if config.training.tokens is not None and consumed != planned:
        raise UserError(
            f"{path} has consumed {consumed} sequences in {state.step} steps, where training.global_batch and "
            f"training.batch_ramp make {planned}, so training.tokens does not say how many steps are left. Give "
            "training.steps instead."
        )


def _check_skipped(path: Path, config: Config, state: TrainState, saved: list[list[int]]) -> None:
    """What lies before the checkpoint's position is done: it can't be skipped, or taken, afterwards."""
    there, here = ([(start, stop) for start, stop in saved], _skipped_before(config.data.skip_ranges, state.position))
    if there != here:
        raise UserError(
            f"{path} can't be resumed: before its position {state.position} the positions {_ranges(there)} were left "
            f"out, and data.skip_ranges leaves out {_ranges(here)}. What is done stays done: resume from a checkpoint "
            f"before the range, or let it begin at {state.position} or later and keep the earlier ones."
        )


def _ranges(ranges: list[tuple[int, int]]) -> str:
    return ", ".join(f"[{start}, {stop})" for start, stop in ranges) or "none"


def _skipped_before(ranges: tuple[tuple[int, int], ...], position: int) -> list[tuple[int, int]]:
    return [(start, min(stop, position)) for start, stop in ranges if start < position]


def _model(config: Config, data: RunData) -> dict[str, Any]:
    layout = {f"optimizer.{key}": value for key, value in config.optimizer.layout().items()}
    vocabulary = config.model.resolve_vocab_size(data.tokenizer.vocab_size)
    return {**plain(config)["model"], "vocab_size": vocabulary, **layout}


def _topology(config: Config, ranks: Distributed) -> dict[str, Any]:
    return {
        "world_size": ranks.world_size,
        "zero_stage": config.engine.zero_stage,
        "expert_parallel": config.engine.expert_parallel,
        "offload_optimizer": config.engine.offload_optimizer,
        "precision": config.training.precision,
    }


def _same_precision(path: Path, there: str, here: str) -> None:
    """Another precision is not another layout of the same run: every loss after it would be another."""
    if there != here:
        raise UserError(
            f"{path} can't be resumed: it was trained in another precision (precision: {there!r} in the checkpoint, "
            f"{here!r} now). Give training.precision={there}, or begin a new run with its weights "
            f"(model.weights_from={path})."
        )


def _same(what: str, path: Path, there: dict[str, Any], here: dict[str, Any], mend: str) -> None:
    if changes := _differences(there, here):
        raise UserError(f"{path} can't be resumed: {what} differs ({changes}). {mend}.")


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    return "; ".join(
        f"{key}: {_short(there.get(key))} in the checkpoint, {_short(here.get(key))} now"
        for key in sorted(there.keys() | here.keys(), key=lambda key: (key != "tokenizer", key))
        if there.get(key) != here.get(key)
    )


def _short(value: Any) -> str:
    """A value for people: the first digits of a hash do."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(item)}" for key, item in value.items()) + "}"
    return value[:12] if isinstance(value, str) and len(value) == 64 else repr(value)


def _accepted_change(path: Path, config: Config, saved: dict[str, Any], here: dict[str, Any]) -> str:
    """How the data, or its order up to the checkpoint's position, differs, where that is accepted; "" if it does not.

    What phases of the mixture that begin later hold may change freely, as may ranges that are skipped later.
    """
    there, given = saved["data"], config.data.accept_change
    others = [{key: value for key, value in side.items() if key != "order"} for side in (there, here)]
    order, data = difference(there["order"], here["order"], saved["position"]), _differences(others[0], others[1])
    if not order and not data and given not in (None, saved["config"]["data"].get("accept_change")):
        raise UserError(
            f"data.accept_change = {given!r} is the code of no change that {path} waits for: the data and its order "
            "up to there are the checkpoint's. Take it away."
        )
    if not order and not data:
        return ""
    again = "counted from position 0 on, so that sequences that were read may come again, and others never"
    what = [f"the order of the data differs ({order}), {again}"] if order else []
    what += [f"the data differs ({data})"] if data else []
    # begins with a letter, or one code in 300 would be a number on the command line, and no string
    code = "c" + hashlib.sha256(json.dumps([there, here], sort_keys=True).encode()).hexdigest()[:11]
    if given == code:
        return "; ".join(what)
    raise UserError(
        f"{path} can't be resumed: {'; '.join(what)}. Give the data settings back, or choose another run.name. Other "
        "weights from here on, nothing read twice, are one more phase, which is not refused: `data.phases` with "
        f"`start: {saved['position']}`, the sources' own weights and earlier phases as they were. To go on with the "
        f"other data all the same, give data.accept_change={code}: the run records it."
    )
