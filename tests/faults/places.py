"""Where a rank can be killed, and how: at the n-th call of a function, a moment later than it began.

The kill is SIGALRM's default action, set off by the kernel's timer: no handler runs, and it hits whatever the process
does at that microsecond, in Python or below it.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data_pipeline.step_reader import StepReader
from pretrain.checkpoint import CheckpointStore
from pretrain.checkpoint import store as store_module
from pretrain.engine import Engine
from pretrain.engine.files import CheckpointFiles
from pretrain.monitor import AttemptsLog, Monitor
from pretrain.objective import Objective
from pretrain.train import Trainer


@dataclass(frozen=True)
class Place:
    """A function that ranks call, and about how long it takes them."""

    owner: Any
    function: str
    most_calls: int
    """Calls of one attempt among which the fatal one is drawn; later ones might not come."""
    seconds: float
    rank_0_only: bool = False


PLACES = {
    "start": Place(CheckpointStore, "find", 1, 0.05),
    "load": Place(Engine, "load", 1, 0.05),
    "prefetch": Place(StepReader, "_read", 3, 0.004),
    "forward": Place(Engine, "training_forward", 12, 0.008),
    "backward": Place(Engine, "backward", 12, 0.012),
    "step": Place(Engine, "step", 6, 0.006),
    "statistics": Place(Objective, "end_step", 6, 0.003),
    "metrics": Place(Monitor, "log", 6, 0.002, rank_0_only=True),
    "evaluation": Place(Trainer, "evaluate", 1, 0.1),
    "save": Place(Engine, "begin_save", 2, 0.03),
    "write": Place(CheckpointFiles, "_write", 3, 0.02),
    "hash": Place(store_module, "record_file", 6, 0.002),
    "publish": Place(CheckpointStore, "_reveal", 2, 0.01, rank_0_only=True),
    "manifest": Place(store_module, "write_manifest", 2, 0.004, rank_0_only=True),
    "clean-up": Place(store_module, "remove", 1, 0.004, rank_0_only=True),
    "end": Place(AttemptsLog, "stop", 1, 0.002, rank_0_only=True),
}


@dataclass(frozen=True)
class Kill:
    """One kill that is to come: in the ``call``-th call (from 1) of a place, ``delay`` seconds after it began."""

    place: str
    rank: int
    call: int
    delay: float


def draw_kill(random: random.Random, ranks: int) -> Kill:
    """Any place, rank and call; the delay may be longer than the call takes, so that what follows is hit too."""
    name = random.choice(sorted(PLACES))
    place = PLACES[name]
    rank = 0 if place.rank_0_only else random.randrange(ranks)
    return Kill(name, rank, random.randint(1, place.most_calls), random.uniform(0, 1.5 * place.seconds))


def arm(kill: Kill) -> None:
    """Let this process die as ``kill`` says."""
    place, seen = PLACES[kill.place], 0
    original: Callable[..., Any] = getattr(place.owner, place.function)

    def deadly(*arguments: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == kill.call:
            if kill.delay < 1e-5:
                os.kill(os.getpid(), signal.SIGKILL)
            signal.setitimer(signal.ITIMER_REAL, kill.delay)
        return original(*arguments, **options)

    setattr(place.owner, place.function, deadly)
