"""torchrun's agent on one node, through its interface: which rank failed first, and how.

The command torchrun hands no worker's exit code on, and says with a traceback what a stop on request is.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from data_pipeline.errors import EXIT_CRASH, EXIT_DONE

from .restarts import SAME_LOOK_SECONDS

PATIENCE_SECONDS = 7 * 24 * 3600
"""Workers that were asked to stop are never killed by the agent while they save: the end of the job does that."""


@dataclass(frozen=True)
class Ended:
    """How the ranks of a node ended. ``exit_code`` is 0, or positive: of the first rank to fail."""

    exit_code: int
    rank: int | None = None
    """The first to fail, counted over all nodes; None where none did, or the agent itself was asked to end."""
    local_rank: int = 0
    pid: int = 0
    code: int = 0
    """Of that rank; -9 where it was killed by signal 9."""
    time: float = 0.0
    """When it failed, in Unix seconds."""

    @property
    def told(self) -> str:
        """One sentence; empty where there is nothing to tell."""
        if self.rank is None:
            return ""
        who = f"rank {self.rank} (process {self.pid})"
        if self.code >= 0:
            return f"{who} ended with {self.code}"
        name = signal.Signals(-self.code).name
        return f"{who} was killed by {name}{', often for lack of memory' if name == 'SIGKILL' else ''}"


def run_agent(config: LaunchConfig, module: str, *arguments: str) -> Ended:
    """``python -m MODULE ARGUMENTS`` on this node's ranks; returns when all have ended."""
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
        return Ended(EXIT_DONE)
    except ChildFailedError as error:
        rank, first = first_failure(error.failures)
        code = max(first.exitcode, EXIT_CRASH)
        return Ended(code, rank, first.local_rank, first.pid, first.exitcode, first.timestamp)
    except SignalException:
        return Ended(EXIT_CRASH)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)


def first_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that failed first. One that was killed leaves no time of its own but when the agent found it, often
    together with those that lost it, which do: it goes before them."""
    began = min(failure.timestamp for failure in failures.values())

    def order(found: tuple[int, ProcessFailure]) -> tuple[int, int]:
        failure = found[1]
        # the agent ends the ranks that are left by SIGTERM, and later by SIGKILL: those failures come later
        ended_by_agent = failure.exitcode == -signal.SIGTERM or failure.timestamp > began + SAME_LOOK_SECONDS
        return (2 if ended_by_agent else 0 if failure.exitcode < 0 else 1), failure.timestamp

    return min(failures.items(), key=order)
