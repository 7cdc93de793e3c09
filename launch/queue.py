"""Slurm's commands, asked politely."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import UserError
from pretrain.monitor import lines

PATIENCE_SECONDS = 30


class SlurmError(UserError):
    """Slurm refused, or does not answer."""


def have(command: str) -> bool:
    """Whether one of Slurm's commands is installed here."""
    return shutil.which(command) is not None


def run(*command: str) -> str:
    """The output of one of Slurm's commands.

    Raises:
        SlurmError: it failed, with what it said.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    except FileNotFoundError as error:
        raise SlurmError(
            f"{command[0]} is not here. Run this on a machine of the cluster with Slurm's commands."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]} does not answer within {PATIENCE_SECONDS} s. Is the cluster up?") from error
    if done.returncode:
        said = " ".join(done.stderr.split()).rstrip(".") or f"exit code {done.returncode}"
        raise SlurmError(f"{command[0]} refuses: {said}.")
    return done.stdout


@dataclass(frozen=True)
class Queued:
    """A job as the queue shows it."""

    job: str
    state: str
    reason: str
    excluded: str = ""
    """Nodes that it must not run on."""


def queued(jobs: list[str]) -> dict[str, Queued]:
    """As :func:`in_the_queue`; empty where there are no jobs, or Slurm does not answer."""
    with suppress(SlurmError):
        return in_the_queue(jobs) if jobs and have("squeue") else {}
    return {}


def in_the_queue(jobs: list[str]) -> dict[str, Queued]:
    """Of these jobs those that Slurm's queue still has, by id (of an array: by its tasks' ids).

    Raises:
        SlurmError: Slurm does not answer.
    """
    try:
        shown = run("squeue", "--noheader", "--states=all", f"--jobs={','.join(jobs)}", "--format=%i|%T|%r|%x")
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return {}  # asked for one alone, Slurm complains that it has forgotten it
        raise
    rows = (line.strip().split("|") for line in shown.splitlines() if line.count("|") == 3)
    return {row[0]: Queued(*row) for row in rows}


def remember(folder: Path, job: str, command: list[str]) -> None:
    """Note in a run folder (or a sweep's) the job that was submitted for it."""
    if (folder / JOBS_FILE).exists():  # else two that submit at once could each begin the file, and one lose its line
        lines.mend(folder / JOBS_FILE)
    lines.append(folder / JOBS_FILE, lines.encode({"job": job, "command": command}), durable=True)


def remembered(folder: Path) -> list[str]:
    """The jobs that were submitted for a folder, oldest first; a half-written last line is left out."""
    return [line["job"] for line in lines.read(folder / JOBS_FILE).objects]


JOBS_FILE = "jobs.jsonl"
"""One line a submitted job: its id and the command."""
