"""``pretrain`` with one fault built in, named by TEST_FAULT as ``place:number``; most are a SIGKILL of this rank there.

Places: ``step:N`` in the forward pass of optimizer step N + 1; ``write:N``, ``manifest:N``, ``rename:N``, ``remove:N``
at the N-th time (from 1) that a rank has written a checkpoint's first tensors, rank 0 is about to write a manifest, to
rename a finished checkpoint, or to remove an old one. ``logits:N`` makes the logits of the sequence at position N of
the run NaN, ``below:N`` what they come from too. A worker that torchrun has restarted has no fault.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import torch

from pretrain.__main__ import main
from pretrain.checkpoint import store
from pretrain.objective import Objective

PLACE, NUMBER = os.environ["TEST_FAULT"].split(":")
seen = 0


def die_at(number: int) -> None:
    global seen
    seen += 1
    if seen == number:
        os.kill(os.getpid(), signal.SIGKILL)


def before(function: Callable[..., Any]) -> Callable[..., Any]:
    def dying(*arguments: Any, **options: Any) -> Any:
        die_at(int(NUMBER))
        return function(*arguments, **options)

    return dying


def die_in_step(begin_step: Callable[..., int | None]) -> Callable[..., int | None]:
    def dying(self: Objective, step: int, *arguments: Any) -> int | None:
        if step == int(NUMBER):
            os.kill(os.getpid(), signal.SIGKILL)
        return begin_step(self, step, *arguments)

    return dying


class OnlyLogits(torch.autograd.Function):
    """NaN forward, the gradient as it comes backward: what is below the logits is sound."""

    @staticmethod
    def forward(context: Any, logits: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return logits * factor

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], None


def poisoned(micro_step: Callable[..., Any]) -> Callable[..., Any]:
    def step(self: Objective, logits: torch.Tensor, batch: Any, *routing: Any) -> Any:
        factor = torch.where(batch.run_positions == int(NUMBER), torch.nan, 1.0)[:, None, None]
        logits = OnlyLogits.apply(logits, factor) if PLACE == "logits" else logits * factor
        return micro_step(self, logits, batch, *routing)

    return step


if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
    pass
elif PLACE == "step":
    Objective.begin_step = die_in_step(Objective.begin_step)  # type: ignore[method-assign]
elif PLACE in ("logits", "below"):
    Objective.micro_step = poisoned(Objective.micro_step)  # type: ignore[method-assign]
    Objective.score = poisoned(Objective.score)  # type: ignore[method-assign]
elif PLACE == "write":
    save = torch.save

    def half_a_save(state: Any, target: Any, *arguments: Any, **options: Any) -> None:
        save(state, target, *arguments, **options)
        if seen + 1 == int(NUMBER):
            target.truncate(target.tell() // 2)
        die_at(int(NUMBER))

    torch.save = half_a_save  # type: ignore[assignment]
elif PLACE == "manifest":
    store.write_manifest = before(store.write_manifest)
elif PLACE == "rename":
    rename = os.rename

    def dying_rename(source: Any, target: Any) -> None:
        if ".saving_" in str(source):
            die_at(int(NUMBER))
        rename(source, target)

    os.rename = dying_rename
elif PLACE == "remove":
    store.remove = before(store.remove)
else:
    raise SystemExit(f"unknown fault {PLACE!r}")

main()
