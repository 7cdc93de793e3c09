"""``pretrain`` with faults built in, named by TEST_FAULT as ``place:number,...``; most kill this rank there by SIGKILL.

Places: ``step:N`` in the forward pass of optimizer step N + 1; ``write:N``, ``manifest:N``, ``rename:N``, ``remove:N``
at the N-th time (from 1) that a rank has written a checkpoint's first tensors, rank 0 is about to write a manifest, to
rename a finished checkpoint, or to remove an old one. ``logits:N`` makes the logits of the sequence at position N of
the run NaN, ``below:N`` what they come from too, ``spike:N`` a thousand times as large. ``gradient:N`` makes the
gradient of rank 1 NaN in optimizer step N + 1, ``flip:N`` adds to its loss there the first time only, as a broken
device would; ``signal:N`` sends rank 1 a SIGTERM in the midst of it. ``lose:N`` removes the N-th checkpoint from the
run folder when it is in the second place. A worker that torchrun has restarted has no fault.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from typing import Any

import torch

from pretrain.__main__ import main
from pretrain.checkpoint import store
from pretrain.objective import Objective

seen = 0


def die_at(number: int) -> None:
    global seen
    seen += 1
    if seen == number:
        os.kill(os.getpid(), signal.SIGKILL)


def before(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    def dying(*arguments: Any, **options: Any) -> Any:
        die_at(number)
        return function(*arguments, **options)

    return dying


def die_in_step(begin_step: Callable[..., int | None], number: int) -> Callable[..., int | None]:
    def dying(self: Objective, step: int, *arguments: Any) -> int | None:
        if step == number:
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


class OnlyGradient(torch.autograd.Function):
    """The loss as it is, and NaN as its derivative."""

    @staticmethod
    def forward(context: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0] * torch.nan


FACTORS = {"logits": torch.nan, "below": torch.nan, "spike": 1000.0}


def poisoned(function: Callable[..., Any], place: str, number: int) -> Callable[..., Any]:
    def step(self: Objective, logits: torch.Tensor, batch: Any, *routing: Any) -> Any:
        factor = torch.where(batch.run_positions == number, FACTORS[place], 1.0)[:, None, None]
        logits = OnlyLogits.apply(logits, factor) if place == "logits" else logits * factor
        return function(self, logits, batch, *routing)

    return step


def broken_device(micro_step: Callable[..., Any], place: str, number: int) -> Callable[..., Any]:
    def step(self: Objective, *arguments: Any) -> Any:
        global seen
        loss = micro_step(self, *arguments)
        if os.environ["RANK"] != "1" or self._current().number != number:
            return loss
        if place == "gradient":
            return OnlyGradient.apply(loss)
        seen += 1
        if seen == 1:
            self._current().losses += 1e6
        return loss

    return step


def signalled(micro_step: Callable[..., Any], number: int) -> Callable[..., Any]:
    def step(self: Objective, *arguments: Any) -> Any:
        global seen
        if os.environ["RANK"] == "1" and self._current().number == number:
            seen += 1
            if seen == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return micro_step(self, *arguments)

    return step


def half_a_save(save: Callable[..., None], number: int) -> Callable[..., None]:
    def saving(state: Any, target: Any, *arguments: Any, **options: Any) -> None:
        save(state, target, *arguments, **options)
        if seen + 1 == number:
            target.truncate(target.tell() // 2)
        die_at(number)

    return saving


def losing_copy(publish_copy: Callable[..., None], number: int) -> Callable[..., None]:
    def publishing(self: store.CheckpointStore, second: Any, name: str, *arguments: Any) -> None:
        global seen
        publish_copy(self, second, name, *arguments)
        seen += 1
        if seen == number:
            shutil.rmtree(self._folder / name)

    return publishing


def dying_rename(rename: Callable[..., None], number: int) -> Callable[..., None]:
    def renaming(source: Any, target: Any) -> None:
        if ".saving_" in str(source):
            die_at(number)
        rename(source, target)

    return renaming


def build_in(place: str, number: int) -> None:
    """Build a fault into the program."""
    if place == "step":
        Objective.begin_step = die_in_step(Objective.begin_step, number)  # type: ignore[method-assign]
    elif place in FACTORS:
        for name in ("micro_step", "score", "sample_losses"):
            setattr(Objective, name, poisoned(getattr(Objective, name), place, number))
    elif place in ("gradient", "flip"):
        Objective.micro_step = broken_device(Objective.micro_step, place, number)  # type: ignore[method-assign]
    elif place == "signal":
        Objective.micro_step = signalled(Objective.micro_step, number)  # type: ignore[method-assign]
    elif place == "write":
        torch.save = half_a_save(torch.save, number)  # type: ignore[assignment]
    elif place == "manifest":
        store.write_manifest = before(store.write_manifest, number)
    elif place == "rename":
        os.rename = dying_rename(os.rename, number)
    elif place == "lose":
        publish = losing_copy(store.CheckpointStore._publish_copy, number)
        store.CheckpointStore._publish_copy = publish  # type: ignore[method-assign]
    elif place == "remove":
        store.remove = before(store.remove, number)
    else:
        raise SystemExit(f"unknown fault {place!r}")


if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    for fault in os.environ["TEST_FAULT"].split(","):
        build_in(fault.split(":")[0], int(fault.split(":")[1]))

main()
