"""Where a rank stands, read off its main thread's stack, and what the ranks' places together say."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

PHASES = {
    "next_step_unless": "waiting for data",
    "begin_step": "agreeing on the batch",
    "training_forward": "forward",
    "backward": "backward",
    "scale_gradients": "backward",
    "step": "optimizer step",
    "end_step": "statistics",
    "_log": "logging",
}
"""Functions of the training loop and what they do; the innermost one on the stack counts."""

_COLLECTIVES = "torch/distributed/distributed_c10d.py"
_HELPERS = ("wrapper", "_")
_LIBRARIES = ("/deepspeed/", "/torch/distributed/")
"""Where a function ``wait...`` waits for a collective that was begun before."""
_OURS = ("/pretrain/", "/data_pipeline/")


@dataclass(frozen=True)
class Account:
    """Of one rank, when its step had taken too long."""

    rank: int
    host: str
    step: int
    phase: str
    """What it was doing, as ``PHASES`` calls it."""
    collective: str | None
    """The function of torch.distributed that some thread of it was in."""
    place: str
    """The innermost line of Headrace's own code, as ``file:line``."""
    alone: bool
    """Whether what keeps it is its own: it waits neither in a collective nor for a device, which may be in one."""

    @property
    def words(self) -> str:
        where = f"in {self.collective}" if self.collective else f"in no collective, at {self.place}"
        return f"{where} ({self.phase} of step {self.step:,})"


def account_of(rank: int, host: str, step: int, on_device: bool = False) -> Account:
    """Where this process stands now, called from another than its main thread.

    Args:
        rank: of this process.
        host: of this process.
        step: that does not end.
        on_device: collectives run on a device, so that a line that waits for it may wait for another rank.
    """
    stacks = {ident: _functions(frame) for ident, frame in sys._current_frames().items()}
    main = stacks.get(threading.main_thread().ident or 0, [])
    phase = next((PHASES[name] for _, name, _ in main if name in PHASES), "between two phases")
    place = next(
        (f"{file}:{line}" for file, _, line in main if any(each in file for each in _OURS)), "an unknown place"
    )
    collective = _collective([main, *stacks.values()])
    alone = collective is None and (not on_device or phase == PHASES["next_step_unless"])
    return Account(rank, host, step, phase, collective, place, alone)


def _functions(frame: FrameType | None) -> list[tuple[str, str, int]]:
    """(file, function, line) from the innermost frame on."""
    found = []
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_code.co_name, frame.f_lineno))
        frame = frame.f_back
    return found


def _collective(stacks: Sequence[Sequence[tuple[str, str, int]]]) -> str | None:
    """The main thread's first: with a GPU it is autograd's thread that reduces gradients."""
    for stack in stacks:
        for file, name, _ in stack:
            if file.endswith(_COLLECTIVES) and not name.startswith(_HELPERS):
                return name
            if name.startswith("wait") and any(each in file for each in _LIBRARIES):
                return "the wait for a collective"
    return None


def guilty(accounts: Sequence[Account], silent: Sequence[int]) -> tuple[int, ...]:
    """The ranks that the others wait for, as far as that is certain enough to do without their nodes.

    Only where some rank waits in a collective, for a rank that alone finds all others missing may be the one that is
    cut off. Then those that say nothing, or, where all do, those that something of their own keeps.
    """
    if all(each.collective is None for each in accounts):
        return ()
    return tuple(sorted(silent)) or tuple(each.rank for each in accounts if each.alone)


def verdict(accounts: Sequence[Account], silent: Mapping[int, str]) -> str:
    """Whom the run waits for, in words.

    Args:
        accounts: of the ranks that answered.
        silent: the others, each with its host.
    """
    told = [
        f"rank {rank} on {host} does not answer (stopped, swapped out, or stuck below Python)"
        for rank, host in sorted(silent.items())
    ]
    apart = [each for each in accounts if each.collective is None]
    told += [f"rank {each.rank} on {each.host} is {each.words}" for each in apart]
    waiting: dict[str, list[int]] = {}
    for each in accounts:
        if each.collective is not None:
            waiting.setdefault(each.words, []).append(each.rank)
    told += [f"{_ranks(ranks)} {words}" for words, ranks in sorted(waiting.items(), key=lambda item: len(item[1]))]
    return "; ".join(told)


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} waits"
    return f"ranks {', '.join(map(str, ranks[:16]))}{', ...' if len(ranks) > 16 else ''} wait"
