"""``pretrain-launch sweep``: members on this machine or as a job array; what is done is not done again."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tenacity
import yaml

from data_pipeline.errors import EXIT_CRASH, EXIT_DONE, EXIT_USER_ERROR
from data_pipeline.files import publish_bytes
from pretrain.monitor import read_attempts
from pretrain.run_folder import plain

from .preflight import Request, failed, preflight, show
from .queue import SlurmError, in_the_queue, remember
from .slurm import Submission
from .snapshot import batch_script, take_snapshot
from .status import SWEEP_FILE, run_status
from .sweep_settings import Member, SweepSettings, load_sweep

MEMBERS = "members"
POLL_SECONDS = 2.0


@dataclass(frozen=True)
class Sweep:
    """A sweep whose members all build, and the folder that holds them."""

    settings: SweepSettings
    members: list[Member]
    folder: Path
    files: list[Path]
    """The resolved configuration of each member."""

    @property
    def open(self) -> list[int]:
        """Numbers of the members that are not done."""
        return [number for number, member in enumerate(self.members) if not done(member)]


def done(member: Member) -> bool:
    """Whether it has reached the end that its configuration has now."""
    attempts = read_attempts(member.folder)
    if not attempts or attempts[-1].reason != "done":
        return False
    return (attempts[-1].last_step or 0) >= member.config.total_steps


def open_sweep(path: Path, overrides: Sequence[str], request: Request) -> Sweep | int:
    """Build every member and check one, write their configurations; 2 where the preflight found errors.

    They lie in a folder that is named by what they hold: tasks of an array that is queued already go on reading
    theirs, by number, whatever the sweep's file says since.
    """
    settings, members = load_sweep(path, tuple(overrides))
    folder = Path(settings.folder) / settings.name
    contents = [yaml.safe_dump(plain(member.config), sort_keys=False).encode() for member in members]
    digest = hashlib.sha256(b"\0".join(contents)).hexdigest()[:12]
    files = [folder / MEMBERS / digest / f"{number:05d}.yaml" for number in range(len(members))]
    sweep = Sweep(settings, members, folder, files)
    files[0].parent.mkdir(parents=True, exist_ok=True)
    for file, content in zip(files, contents, strict=True):
        publish_bytes(file, content)
    publish_bytes(folder / SWEEP_FILE, yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False).encode())
    for number in sweep.open[:1]:
        found = preflight(Request(**{**request.__dict__, "path": files[number], "overrides": ()}))
        print(show(finding for finding in found if finding.severity != "info"), file=sys.stderr)
        if failed(found):
            print(f"member {members[number].name} can't run: nothing was started", file=sys.stderr)
            return EXIT_USER_ERROR
    return sweep


def run_locally(sweep: Sweep, ranks: int, at_a_time: int, dry_run: bool = False) -> int:
    """Run what is open, ``at_a_time`` members together; 1 where one failed. A dry run only prints the commands."""
    logs = sweep.folder / "logs"
    logs.mkdir(exist_ok=True)

    def command(number: int) -> list[str]:
        return [sys.executable, "-m", "launch", "local", "--ranks", str(ranks), str(sweep.files[number])]

    def start(number: int) -> int:
        member, began = sweep.members[number], time.monotonic()
        with open(logs / f"{member.name}.log", "ab") as log:
            code = subprocess.run(
                command(number), stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
            ).returncode
        print(f"{member.name}: ended with {code} after {time.monotonic() - began:.0f} s", flush=True)
        return code

    skipped = len(sweep.members) - len(sweep.open)
    print(f"{sweep.folder}: {len(sweep.open)} members to run, {skipped} are done", flush=True)
    if dry_run:
        print("\n".join(shlex.join(command(number)) for number in sweep.open))
        return EXIT_DONE
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (ranks * at_a_time))))
    with ThreadPoolExecutor(at_a_time) as pool:
        codes = list(pool.map(start, sweep.open))
    return EXIT_CRASH if any(codes) else EXIT_DONE


def submit(sweep: Sweep, options: Sequence[str], at_a_time: int | None, request: Request, dry_run: bool) -> str | None:
    """Queue what is open as one job array; returns its id, or None where nothing was queued."""
    if not sweep.open:
        print(f"{sweep.folder}: all {len(sweep.members)} members are done")
        return None
    (sweep.folder / "logs").mkdir(exist_ok=True)
    code = take_snapshot(sweep.members[0].config, sweep.folder / "code")
    limit = f"%{at_a_time}" if at_a_time else ""
    options = [
        f"--job-name={sweep.settings.name}",
        f"--output={sweep.folder / 'logs' / '%A_%a.out'}",
        f"--array={','.join(map(str, sweep.open))}{limit}",
        *options,
    ]
    environment = {"HEADRACE_CODE": str(code.absolute())}
    if not request.gpus:
        environment["HEADRACE_RANKS_PER_NODE"] = str(request.ranks_per_node)
    script = code / "slurm" / batch_script("pretrain").name
    submission = Submission(options, script, [str(sweep.files[0].parent)], environment)
    if dry_run:
        print(submission)
        return None
    job = submission.submit()
    remember(sweep.folder, job, submission.command)
    print(f"{sweep.folder}: array job {job} of {len(sweep.open)} members; to stop it: scancel {job}", flush=True)
    return job


def wait(job: str) -> None:
    """Until Slurm has no task of an array waiting or running any more.

    Raises:
        SlurmError: Slurm does not answer for a minute; the array goes on.
    """
    patiently = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(SlurmError),
        stop=tenacity.stop_after_delay(60),
        wait=tenacity.wait_fixed(POLL_SECONDS),
        reraise=True,
    )
    while any(
        task.state in ("PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED")
        for task in patiently(in_the_queue, [job]).values()
    ):
        time.sleep(POLL_SECONDS)


def results(sweep: Sweep) -> list[dict[str, Any]]:
    """One row a member: what it changes, how it ended, and its last figures."""
    rows = []
    for member in sweep.members:
        found = run_status(member.folder, {})
        state = "done" if done(member) else found.state if found.state != "done" else "open"
        figures = {"loss": found.loss, "heldout_loss": found.heldout_loss, "tokens_per_second": found.tokens_per_second}
        rows.append({
            "member": member.name, **{f"set/{key}": value for key, value in member.values.items()}, "state": state,
            "step": found.step, **figures, "error": "" if state == "done" else found.last_error,
        })  # fmt: skip
    return rows


def show_results(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, the failed members told below it."""
    names = list(dict.fromkeys(key for row in rows for key in row if key != "error"))
    lines = [[name.removeprefix("set/") for name in names], ["---"] * len(names)]
    lines += [[_cell(row.get(name)) for name in names] for row in rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    failures = [f"{row['member']}: {row['error'] or row['state']}" for row in rows if row["state"] != "done"]
    if not failures:
        return f"{table}\n\nall {len(rows)} members are done"
    told = "\n".join(failures)
    return (
        f"{table}\n\n{len(failures)} of {len(rows)} members are not done (the same command runs these again):\n{told}"
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return "" if value is None else str(value)
