"""Preflight of the run itself: configuration, divisibility, model, data, tokenizer, checkpoint to go on from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from data_pipeline.errors import DataError, HeadraceError, UserError
from data_pipeline.manifest import HELDOUT
from data_pipeline.stream import Stream, open_split, open_stream
from pretrain.beginning import open_beginning
from pretrain.check import check_run, warnings
from pretrain.checkpoint import complete_checkpoints, read_state, refuse_copies, step_of
from pretrain.checkpoint.manifest import NAME as MANIFEST_NAME
from pretrain.checkpoint.manifest import problems, read_manifest
from pretrain.checkpoint.second import attempt_copy, second_place
from pretrain.config import Config
from pretrain.data import RunData, open_data
from pretrain.engine import accumulation_steps, deepspeed_config
from pretrain.missing import check_missing
from pretrain.model import count_parameters
from pretrain.optimizer import check_schedule
from pretrain.run_folder import CHECKPOINTS, versions
from pretrain.state import TrainState, end_position, leaving_out, left_out, resume_state

from .findings import Code, Finding, Request, Severity, refused

T = TypeVar("T")
SAMPLED = 8
"""Sequences of each source that are read and compared with their checksums."""
RESTORE = "Restore the data set from a copy (`pretrain-data verify` lists all damage), or mend data.sources."
WITHOUT_SECOND = "take out checkpoint.second to start without it"


def configuration(config: Config, request: Request) -> Iterator[Finding]:
    """Batches against every number of ranks, the engine's and the schedule's settings, the model's shape."""
    for world in request.worlds:
        if found := _tried("batch", partial(accumulation_steps, config, world), "Take another number of ranks."):
            yield found
            return
    checks: dict[Code, Callable[[], object]] = {
        "engine": lambda: deepspeed_config(config, request.worlds[-1]),
        "schedule": lambda: check_schedule(config.schedule, config.total_steps),
        "model": lambda: count_parameters(config.model, config.model.vocab_size or 1024),
    }
    for code, check in checks.items():
        if found := _tried(code, check, f"Mend the section {code} of the configuration."):
            yield found
    for world in request.worlds:
        for told in warnings(config, world):
            yield Finding("run.warning", "warning", f"On {world} ranks: {told}", "Change it, unless it is meant.")


def data(config: Config, request: Request, opened: list[RunData]) -> Iterator[Finding]:
    """Data sets there, whole by their sizes, readable at samples; tokenizer; held-out text. Fills ``opened``."""
    try:
        stream = open_stream(config.data, config.run.seed)
    except HeadraceError as error:
        yield refused("data.damaged" if isinstance(error, DataError) else "data.missing", error, RESTORE)
        return
    for name, source in zip(stream.names, stream.sources, strict=True):
        where, identity = f"data.sources.{name}: {config.data.sources[name].path}", source.manifest.identity[:12]
        yield Finding("data", "info", f"{where}, {source.sequences:,} sequences, identity {identity}.")
        if source.unusable:
            amiss = f"shards that are not as the manifest says: {len(source.unusable):,}, first: {source.unusable[0]}"
            yield Finding("data.holes", "warning", f"{where}: {amiss}.", f"{RESTORE} What can't be read becomes holes.")
    damaged = _sampled(config, stream)
    stream.close()
    if damaged:
        yield damaged
    if config.evaluation.every_steps is not None:
        for name in stream.names:
            mend = "Set evaluation.every_steps=null to do without held-out text."
            if found := _tried("data.heldout", partial(_heldout, config, name), mend):
                yield found
                return
    try:
        opened.append(open_data(config))
    except HeadraceError as error:
        yield refused("tokenizer", error, "Mend data.tokenizer or model.vocab_size.")
        return
    if found := _tried("run", lambda: check_run(config, request.worlds[-1]), "Mend these settings."):
        yield found


def _sampled(config: Config, stream: Stream) -> Finding | None:
    """Read some sequences of each source: the block of each is compared with its checksum."""
    try:
        for source in stream.sources:
            if config.data.on_damage == "stop" and not source.remote:
                source.read(np.linspace(0, source.sequences - 1, SAMPLED).astype(np.int64))
    except HeadraceError as error:
        return refused("data.damaged", error, RESTORE)
    return None


def _heldout(config: Config, name: str) -> None:
    open_split(config.data, name, HELDOUT).close()


def _missing(config: Config, data: RunData, state: TrainState) -> Finding | None:
    """More missing shards than the run may lose."""
    place = (state.holes, state.position, end_position(config, state))
    return _tried("data.holes", lambda: check_missing(config, data, *place), RESTORE)


def _newer_elsewhere(config: Config, newest: Path | None) -> Finding | None:
    """What of the second place for checkpoints comes before the ``newest`` complete one of the run folder."""
    second = second_place(config.checkpoint, config.run_folder.name)
    if second is None:
        return None
    names, failure = attempt_copy(second.complete)
    if failure:
        cause = f"whether there is a newer checkpoint in {second.address} can't be seen: {failure}."
        severity: Severity = "warning" if newest else "error"
        return Finding("resume.second", severity, cause, f"Mend that, or {WITHOUT_SECOND}.")
    if names and (newest is None or names[-1] > newest.name):
        cause = f"The start fetches {second.address}/{names[-1]}, newer than what the run folder has"
        return Finding("resume.second", "info", f"{cause}; it is compared with the configuration then.")
    return None


def resume(config: Config, request: Request, data: RunData) -> Iterator[Finding]:
    """Whether the run can go on from what it would go on from, or can begin."""
    folder = config.run_folder / CHECKPOINTS
    origin: Path | None = None
    if config.resume == "never":
        refuse = partial(refuse_copies, config.checkpoint, config.run_folder.name)
        if found := _tried("resume.second", refuse, f"{WITHOUT_SECOND.capitalize()}."):
            yield found
            return
    else:
        for path in sorted(folder.glob("step_*")):
            files = read_manifest(path)
            if (path / MANIFEST_NAME).exists() and (files is None or problems(path, files, hashes=False)):
                damage = "; ".join(problems(path, files, hashes=False)[:2]) if files else "its manifest can't be read"
                mend = "Restore it from a copy; else the run goes on from an older one."
                yield Finding("resume.damaged", "warning", f"{path} is damaged: {damage}.", mend)
        complete = complete_checkpoints(folder)
        origin = complete[-1] if complete else None
        if elsewhere := _newer_elsewhere(config, origin):
            yield elsewhere
            if elsewhere.severity != "warning":
                return
        if origin is None and config.resume != "auto":
            origin = Path(config.resume)
            files = read_manifest(origin)
            if files is None or problems(origin, files, hashes=False):
                cause = f"resume = {config.resume!r} is no complete checkpoint."
                yield Finding("resume.missing", "error", cause, "Give the path of a step_... folder, auto, or never.")
                return
    if origin is None:
        if (found := _tried("data.tokens", lambda: open_beginning(config, data), "Mend these settings.")) or (
            found := _missing(config, data, open_beginning(config, data).state)
        ):
            yield found
        return
    skipping = leaving_out(config, left_out(config, origin))
    try:
        state = resume_state(origin, skipping, data)
    except HeadraceError as error:
        yield refused("resume.incompatible", error, "Take the settings back, or start over with another run.name.")
        return
    if found := _missing(skipping, data, state):
        yield found
    step, total = step_of(origin), config.total_steps
    if step >= total:
        yield Finding("resume.complete", "warning", f"{origin} is the run's end: nothing is left.", "Raise its steps.")
    else:
        yield Finding("resume", "info", f"Goes on from {origin} at step {step:,} of {total:,}.")
    there, here = read_state(origin).get("versions", {}), versions()
    if changed := [f"{key} {there[key]} -> {here.get(key)}" for key in there if there[key] != here.get(key)]:
        yield Finding(
            "versions.changed", "warning",
            f"Since that checkpoint: {', '.join(changed)}. The run may not go on to the same bits.",
            "Go on with the former versions where that matters.",
        )  # fmt: skip


def software() -> Iterator[Finding]:
    """Versions that decide what the run computes."""
    cuda = torch.version.cuda
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    yield Finding("versions", "info", f"{found}, CUDA {cuda or 'none'}.")


def needs_cuda(request: Request) -> Iterator[Finding]:
    """A torch without CUDA would train on the CPUs of nodes with GPUs."""
    if request.gpus and torch.version.cuda is None:
        yield Finding(
            "versions.cuda", "warning", f"torch {torch.__version__} is built without CUDA.",
            "Where the nodes have another environment (HEADRACE_SETUP, a container), that is all right; else install "
            "torch with CUDA.",
        )  # fmt: skip


def _tried(code: Code, check: Callable[[], object], fix: str) -> Finding | None:
    try:
        check()
    except HeadraceError as error:
        return refused(code, error, fix)
    except ValueError as error:  # of a model's shape
        return refused(code, UserError(str(error)), fix)
    return None
