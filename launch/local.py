"""``pretrain-launch local``: a run under torchrun's agent on this machine, ending with the run's own exit code.

Why the run ended is read in attempts.jsonl.
"""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig

from data_pipeline.errors import UserError
from pretrain.config import load_config
from pretrain.monitor import read_attempts

from .agent import PATIENCE_SECONDS, run_agent


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
        shutdown_timeout=PATIENCE_SECONDS,
    )
    ended = run_agent(config, "pretrain", "train", str(path), *overrides)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    if ended.code < 0:
        print(
            f"error: {ended.told}; what other ranks say follows from that. Start the same command again: it goes on "
            "from the newest checkpoint.",
            file=sys.stderr,
        )
    attempts = read_attempts(folder)[before:]
    recorded = attempts[-1].exit_code if attempts else None
    if recorded and attempts[-1].reason != "stopped":
        # last, after what the other ranks had to say about the one that broke the connection
        print(f"error: the run ended ({attempts[-1].ended}): {attempts[-1].message}", file=sys.stderr, flush=True)
    # before a run folder is there to record a reason, the first rank to fail is all that tells it
    return ended.exit_code if recorded is None else recorded
