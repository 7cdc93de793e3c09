"""A run started again and again by processes that stay, so that an attempt costs no start-up; and how runs compare."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.explain import ExplainedRow, explain
from pretrain.checkpoint import complete_checkpoints
from pretrain.config import load_config
from pretrain.distributed import Distributed


@dataclass(frozen=True)
class Ended:
    """How an attempt ended, and the checkpoints that there were then."""

    code: int
    why: str
    checkpoints: list[str]


def meet() -> Distributed:
    """This process among its peers, for :func:`train_here`."""
    from pretrain import run

    run.lock_run_folder = lambda folder: 0  # the same process starts the run again
    return run.start(60)


def train_here(ranks: Distributed, config: Path, *overrides: str) -> Ended:
    """One attempt at a run, on each of its ranks; an error must be one that all of them have."""
    from pretrain import run
    from pretrain.signals import StopRequest

    settings, session, why = load_config(config, overrides), run.Session(ranks), ""
    try:
        session.run(settings, StopRequest())
        code = session.end("done", 0)
    except run.TOGETHER as error:
        why, code = str(error), session.end("user_error", error.exit_code, error)
    ranks.barrier()
    return Ended(code, why, [path.name for path in complete_checkpoints(settings.run_folder / "checkpoints")])


def kept(run: Path) -> dict[str, list[bytes]]:
    """The tensors of the last checkpoint, in the order of each file; not its bytes, which hang on the process too."""
    folder = complete_checkpoints(run / "checkpoints")[-1]
    files = sorted(folder.rglob("*.pt"))
    assert len(files) >= 2, "weights with optimizer, and random states"
    return {str(file.relative_to(folder)): [*values(torch.load(file, weights_only=False))] for file in files}


def values(content: Any) -> Iterator[bytes]:
    if isinstance(content, torch.Tensor):
        yield content.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(content, dict | list | tuple):
        for item in content.values() if isinstance(content, dict) else content:
            yield from values(item)


def read(run: Path, steps: int) -> list[list[ExplainedRow]]:
    """What each step has read, as ``explain`` tells."""
    return [list(explain(run, step, None, None, False)) for step in range(1, steps + 1)]
