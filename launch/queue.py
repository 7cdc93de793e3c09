"""Slurm's commands, asked politely."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import HeadraceError, UserError

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
        raise SlurmError(f"{command[0]} refuses: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
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
    """Of these jobs those that Slurm's queue still has, by id; empty where Slurm does not answer."""
    if not jobs or not have("squeue"):
        return {}
    try:
        shown = run("squeue", "--noheader", "--states=all", "--format=%i|%T|%r|%x")
    except HeadraceError:
        return {}
    rows = (line.strip().split("|") for line in shown.splitlines() if line.count("|") == 3)
    return {row[0]: Queued(*row) for row in rows if row[0].partition("_")[0] in jobs}


def remember(folder: Path, job: str, command: list[str]) -> None:
    """Note in a run folder (or a sweep's) the job that was submitted for it."""
    with open(folder / JOBS_FILE, "a") as handle:
        handle.write(json.dumps({"job": job, "command": command}) + "\n")


def remembered(folder: Path) -> list[str]:
    """The jobs that were submitted for a folder, oldest first."""
    path = folder / JOBS_FILE
    return [json.loads(line)["job"] for line in path.read_text().splitlines()] if path.exists() else []


JOBS_FILE = "jobs.jsonl"
"""One line a submitted job: its id and the command."""
