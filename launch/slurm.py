"""``pretrain-launch slurm``: preflight, snapshot, then ``sbatch`` of slurm/pretrain.sbatch as it is."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.errors import EXIT_DONE, EXIT_USER_ERROR, UserError
from pretrain.config import load_config

from .preflight import Finding, Request, failed, preflight, show
from .queue import SlurmError, queued, remember, remembered, run
from .snapshot import CONFIG, take_snapshot


@dataclass(frozen=True)
class Submission:
    """One call of sbatch: its options, what the script is given, and the environment that it gets besides."""

    options: Sequence[str]
    script: Path
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> list[str]:
        return ["sbatch", "--parsable", *self.options, str(self.script), *self.arguments]

    def __str__(self) -> str:
        """The exact command, for a shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.command)])

    def submit(self) -> str:
        """Queue it; returns the job's id.

        Raises:
            SlurmError: sbatch refused.
        """
        os.environ.update(self.environment)
        try:
            return run(*self.command).strip().partition(";")[0]  # on a federation sbatch says ID;CLUSTER
        finally:
            for name in self.environment:
                del os.environ[name]


def launch_slurm(request: Request, options: Sequence[str], restarts: int, dry_run: bool) -> int:
    """Submit a run, and ``restarts`` jobs behind it that go on with it.

    Args:
        request: the run; its preflight must have no errors.
        options: of sbatch.
        restarts: further jobs, each of which begins when the one before has ended.
        dry_run: only print the exact commands; the run folder is not made.

    Returns:
        0, or 2 where the preflight found errors; nothing was submitted then.
    """
    found = preflight(request)
    if not failed(found):
        found += _in_the_queue(load_config(request.path, request.overrides).run_folder)
    print(show(finding for finding in found if finding.severity != "info"), file=sys.stderr)
    if failed(found):
        print("nothing was submitted", file=sys.stderr)
        return EXIT_USER_ERROR
    config = load_config(request.path, request.overrides)
    folder = config.run_folder
    code = folder / "code" / "DIGEST" if dry_run else take_snapshot(config, folder / "code")
    if not dry_run:
        (folder / "logs").mkdir(exist_ok=True)
    options = [f"--job-name={config.run.name}", f"--output={folder / 'logs' / '%j.out'}", *options]
    jobs: list[str] = []
    for number in range(1 + restarts):
        submission = _submission(code, options, jobs[-1] if jobs else "JOB", number, request)
        if dry_run:
            print(submission)
            continue
        try:
            jobs.append(submission.submit())
        except SlurmError:
            if jobs:
                run("scancel", *jobs)
            raise
        remember(folder, jobs[-1], submission.command)
        print(f"{config.run.name}: job {jobs[-1]}")
    if jobs:
        print(f"{folder}: `pretrain-launch status {folder}` shows how it goes; to stop it: scancel {' '.join(jobs)}")
    return EXIT_DONE


def _submission(code: Path, options: Sequence[str], before: str, number: int, request: Request) -> Submission:
    environment = {"HEADRACE_CODE": str(code.absolute())}
    if not request.gpus:
        environment["HEADRACE_RANKS_PER_NODE"] = str(request.ranks_per_node)
    if number:
        environment["HEADRACE_FOLLOWER"] = "yes"
        options = [*options, f"--dependency=afterany:{before}"]
    return Submission(options, code / "slurm" / "pretrain.sbatch", [str(code / CONFIG)], environment)


def _in_the_queue(folder: Path) -> list[Finding]:
    active = [job for job in queued(remembered(folder)).values() if job.state in ("PENDING", "RUNNING", "SUSPENDED")]
    if not active:
        return []
    told = ", ".join(f"{job.job} ({job.state})" for job in active)
    fix = f"Wait for it, or end it: scancel {' '.join(job.job for job in active)}"
    return [Finding("run.queued", "error", f"{folder} has jobs in the queue already: {told}.", fix)]


def node_range(text: str) -> tuple[int, int]:
    """``4`` or ``2-4`` as sbatch takes it.

    Raises:
        UserError: it is neither.
    """
    least, _, most = text.partition("-")
    try:
        found = int(least), int(most or least)
    except ValueError:
        found = (0, 0)
    if not 1 <= found[0] <= found[1]:
        raise UserError(f"--nodes {text}: give a number of nodes, or a range such as 2-4.")
    return found
