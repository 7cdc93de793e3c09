"""``pretrain`` with one fault built in, named by TEST_FAULT as ``place:number``: SIGKILL of this rank at that place.

Places: ``step:N`` in the forward pass of optimizer step N + 1; ``write:N``, ``manifest:N``, ``rename:N``, ``remove:N``
at the N-th time (from 1) that a rank has written a checkpoint's first tensors, rank 0 is about to write a manifest, to
rename a finished checkpoint, or to remove an old one. A worker that torchrun has restarted has no fault.
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


if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
    pass
elif PLACE == "step":
    Objective.begin_step = die_in_step(Objective.begin_step)  # type: ignore[method-assign]
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
    store._remove = before(store._remove)
else:
    raise SystemExit(f"unknown fault {PLACE!r}")

main()
