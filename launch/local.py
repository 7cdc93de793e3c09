"""``pretrain-launch local``: a run under torchrun's agent on this machine, ending with the run's own exit code.

torchrun hands no worker's exit code on, and says with a traceback what a stop on request is; so the agent is started
through its interface, and why the run ended is read in attempts.jsonl.
"""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from data_pipeline.errors import EXIT_CRASH, EXIT_DONE, UserError
from pretrain.config import load_config
from pretrain.monitor import read_attempts

_SAME_LOOK_SECONDS = 5
"""The agent ends the ranks that are left by SIGTERM, and after 30 s by SIGKILL: those failures come later."""


def launch_local(path: Path, overrides: Sequence[str], ranks: int) -> int:
    """Train with ``ranks`` processes on this machine; SIGTERM, SIGINT and SIGUSR1 are handed on to them.

    Returns:
        the exit code that the run recorded for this attempt; 1 when it recorded none (it was killed).

    Raises:
        UserError: the configuration is wrong; nothing was started.
    """
    if ranks < 1:
        raise UserError(f"--ranks {ranks}: a run needs at least one process.")
    folder = load_config(path, overrides).run_folder
    before = len(read_attempts(folder))
    # one thread pool a rank, together no more than the cores; torchrun's own default is one thread
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGTERM,SIGINT,SIGUSR1",
    )
    try:
        elastic_launch(config, sys.executable)("-m", "pretrain", "train", str(path), *overrides)
        code = EXIT_DONE
    except ChildFailedError as error:
        # before a run folder is there to record a reason, the first rank to fail is all that tells it
        rank, first = _first_failure(error.failures)
        code = max(first.exitcode, EXIT_CRASH)
        if first.exitcode < 0:
            name = signal.Signals(-first.exitcode).name
            print(
                f"error: rank {rank} (process {first.pid}) was killed by {name}"
                f"{', often for lack of memory' if name == 'SIGKILL' else ''}; what other ranks say follows from that. "
                "Start the same command again: it goes on from the newest checkpoint.",
                file=sys.stderr,
            )
    except SignalException:
        code = EXIT_CRASH
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
    attempts = read_attempts(folder)[before:]
    recorded = attempts[-1].exit_code if attempts else None
    if recorded and attempts[-1].reason != "stopped":
        # last, after what the other ranks had to say about the one that broke the connection
        print(f"error: the run ended ({attempts[-1].ended}): {attempts[-1].message}", file=sys.stderr, flush=True)
    return code if recorded is None else recorded


def _first_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that failed first. One that was killed leaves no time of its own but when the agent found it, often
    together with those that lost it, which do: it goes before them."""
    began = min(failure.timestamp for failure in failures.values())

    def order(found: tuple[int, ProcessFailure]) -> tuple[int, int]:
        failure = found[1]
        ended_by_agent = failure.exitcode == -signal.SIGTERM or failure.timestamp > began + _SAME_LOOK_SECONDS
        return (2 if ended_by_agent else 0 if failure.exitcode < 0 else 1), failure.timestamp

    return min(failures.items(), key=order)
