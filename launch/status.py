"""``pretrain-launch status``: every run below a folder, from what it left behind and from Slurm's queue."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pretrain.monitor import Attempt, read_attempts, read_metrics
from pretrain.monitor.progress import duration
from pretrain.run_folder import CONFIG_FILE

from .queue import JOBS_FILE, queued, remembered

_SIGNS = (CONFIG_FILE, "attempts.jsonl", JOBS_FILE)
SWEEP_FILE = "sweep.yaml"
"""What marks a folder of a sweep, whose members are runs."""


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands. What is not known is None."""

    folder: str
    state: str
    """Slurm's of the newest job that is in the queue; else ``done``, ``stopped``, ``crash``, ..., ``running`` where
    the last line is fresh, ``silent`` where it is not, ``new`` where nothing was started."""
    job: str | None
    reason: str | None
    """Why Slurm lets the job wait."""
    excluded: str | None
    """Nodes that the job must not run on, because they failed."""
    step: int
    total_steps: int | None
    loss: float | None
    heldout_loss: float | None
    tokens_per_second: float | None
    eta_seconds: float | None
    updated: float | None
    """Unix seconds of the newest line."""
    attempts: int
    last_error: str


def find_runs(folder: Path) -> Iterator[Path]:
    """The run folders at and below ``folder``, in order of their names."""
    for path, folders, files in os.walk(folder):
        folders.sort()
        is_sweep = SWEEP_FILE in files
        if any(sign in files for sign in _SIGNS) and not is_sweep:
            folders.clear()  # what lies below is the run's own
            yield Path(path)
        elif is_sweep:
            folders[:] = [name for name in folders if name not in ("code", "members", "logs")]


def status(folder: Path) -> list[RunStatus]:
    """The state of every run at and below ``folder``."""
    runs = list(find_runs(folder))
    queue = queued([job for run in runs for job in remembered(run)])
    return [run_status(run, queue) for run in runs]


def run_status(folder: Path, queue: dict[str, Any], now: float | None = None) -> RunStatus:
    """The state of one run; ``queue`` is what Slurm has of its jobs."""
    attempts, lines = read_attempts(folder), read_metrics(folder)
    steps = [line for line in lines if "loss" in line and "evaluation" not in line]
    evaluations = [line for line in lines if "evaluation" in line]
    newest = steps[-1] if steps else {}
    total = _total_steps(folder)
    step = max([newest.get("step", 0), *(attempt.last_step or 0 for attempt in attempts[-1:])])
    jobs = [queue[job] for job in remembered(folder) if job in queue]
    active = [job for job in jobs if job.state in ("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED")]
    job = active[0] if active else jobs[-1] if jobs else None
    updated = lines[-1].get("time") if lines else attempts[-1].started if attempts else None
    state = active[0].state if active else _ended(attempts, newest, updated, now or time.time())
    pace = newest.get("step_seconds")
    left = (total - step) * pace if total and pace and step < total and state in ("RUNNING", "running") else None
    failures = [each for each in attempts if each.reason not in ("done", "stopped", None) or _killed(each, attempts)]
    last = failures[-1] if failures else None
    return RunStatus(
        folder=str(folder),
        state=state,
        job=job.job if job else None,
        reason=job.reason if job and job.state == "PENDING" else None,
        excluded=(job.excluded or None) if job else None,
        step=step,
        total_steps=total,
        loss=newest.get("loss"),
        heldout_loss=evaluations[-1].get("loss") if evaluations else None,
        tokens_per_second=newest.get("tokens_per_second"),
        eta_seconds=left,
        updated=updated,
        attempts=len(attempts),
        last_error=f"attempt {last.number}: {last.ended}: {last.message}".rstrip(": ") if last else "",
    )


def _killed(attempt: Attempt, attempts: list[Attempt]) -> bool:
    """Whether it left no stop although another one came after it."""
    return attempt.reason is None and attempt is not attempts[-1]


def _ended(attempts: list[Attempt], newest: dict[str, Any], updated: float | None, now: float) -> str:
    if not attempts:
        return "new"
    if attempts[-1].reason is not None:
        return attempts[-1].reason
    patience = max(60.0, 10 * newest.get("step_seconds", 0.0))
    return "running" if updated is not None and now - updated < patience else "silent"


def _total_steps(folder: Path) -> int | None:
    """From the resolved configuration; None where the run has none yet, or counts tokens."""
    path = folder / CONFIG_FILE
    if not path.exists():
        return None
    training = (yaml.safe_load(path.read_text()) or {}).get("training", {})
    steps = training.get("steps")
    if steps is None and not training.get("batch_ramp"):
        length = yaml.safe_load(path.read_text())["data"]["seq_len"]
        steps = -(-training["tokens"] // (length * training["global_batch"]))
    return int(steps) if steps is not None else None


def show_status(runs: list[RunStatus], now: float | None = None) -> str:
    """A table for people, with the last error of a run below its line."""
    now, lines = now or time.time(), []
    width = max((len(run.folder) for run in runs), default=0)
    for run in runs:
        parts = [f"{run.folder:<{width}}  {run.state:<10}", f"step {run.step:,}/{run.total_steps or 0:,}"]
        if run.job:
            without = f" without {run.excluded}" if run.excluded else ""
            parts.append(f"job {run.job}{f' ({run.reason})' if run.reason else ''}{without}")
        if run.loss is not None:
            parts.append(f"loss {run.loss:.4f}")
        if run.tokens_per_second:
            parts.append(f"{run.tokens_per_second:,.0f} tokens/s")
        if run.eta_seconds is not None:
            parts.append(f"ETA {duration(run.eta_seconds)}")
        if run.updated is not None:
            parts.append(f"{duration(now - run.updated)} ago")
        lines.append("  ".join(parts))
        if run.last_error:
            lines.append(f"{'':<{width}}  {run.last_error}")
    return "\n".join(lines) or "no runs here"
