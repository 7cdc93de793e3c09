"""Preflight of the allocation: time limit, partition, account, nodes, as far as Slurm's commands are there."""

from __future__ import annotations

import getpass
import itertools
import re
import statistics
from collections.abc import Iterator

from data_pipeline.errors import HeadraceError
from launch.queue import have, run
from pretrain.checkpoint import complete_checkpoints, read_manifest
from pretrain.config import Config
from pretrain.monitor import read_metrics
from pretrain.monitor.progress import duration
from pretrain.run_folder import CHECKPOINTS

from .findings import Finding, Request


def check_time(config: Config, request: Request) -> Iterator[Finding]:
    """Steps and saves of this run so far against the time limit and the signal before it."""
    pace, save = step_seconds(config), save_seconds(config)
    if request.time_limit is not None and request.signal_lead >= request.time_limit:
        lead, limit = duration(request.signal_lead), duration(request.time_limit)
        cause = f"The request to stop comes {lead} before a limit of {limit}."
        yield Finding("time.lead", "error", cause, "Raise --time, or lower --signal.")
        return
    if pace is None:
        yield Finding("time.unknown", "info", "This run has no steps yet, so its pace is not known.")
        return
    need = 2 * pace + (save or 0.0)
    if need > request.signal_lead:
        cause = (
            f"A step takes {pace:.1f} s and a save {save or 0.0:.1f} s: the ranks may need {need:.0f} s from the "
            f"request to stop on, and have {request.signal_lead:.0f} s."
        )
        yield Finding("time.lead", "error", cause, f"Submit with --signal=B:USR1@{int(2 * need) + 60}.")
    done = max((line["step"] for line in read_metrics(config.run_folder)), default=0)
    left = max(0, config.total_steps - done) * pace
    told = f"{config.total_steps - done:,} steps of {pace:.2f} s are left: {duration(left)}"
    if request.time_limit is None:
        yield Finding("time", "info", f"{told}.")
        return
    jobs = max(1, -(-left // (request.time_limit - request.signal_lead)))
    yield Finding("time", "info", f"{told}, {jobs:.0f} allocations of {duration(request.time_limit)}.")


def step_seconds(config: Config) -> float | None:
    """Median of the newest 50 logged steps of the run folder."""
    seconds = [line["step_seconds"] for line in read_metrics(config.run_folder) if "step_seconds" in line]
    return statistics.median(seconds[-50:]) if seconds else None


def save_seconds(config: Config) -> float | None:
    """How long the newest checkpoint took, from its first file to its manifest; None where there is none."""
    for path in reversed(complete_checkpoints(config.run_folder / CHECKPOINTS)):
        times = [(path / file.path).stat().st_mtime for file in read_manifest(path) or []]
        return max(0.0, (path / "MANIFEST.json").stat().st_mtime - min(times)) if times else None
    return None


def check_slurm(request: Request) -> Iterator[Finding]:
    """The partition's limits and nodes, and the user's accounts."""
    if not (request.cluster and have("sinfo")):
        return
    try:
        shown = run("sinfo", "--noheader", "--format=%R|%l|%D|%G|%a")
        default = _default_partition() if request.partition is None else []
    except HeadraceError as error:
        mend = "The partition was not checked: see that `sinfo` answers here, then ask again."
        yield Finding("slurm.unreachable", "warning", str(error), mend)
        return
    rows = [line.split("|") for line in shown.splitlines() if line.count("|") == 4]
    names = sorted({row[0] for row in rows})
    wanted = [name for name in default if name in names] if request.partition is None else request.partition.split(",")
    if unknown := [name for name in wanted if name not in names]:
        cause = f"There is no partition {unknown[0]!r}."
        yield Finding("slurm.partition", "error", cause, f"Those of this cluster are {', '.join(names)}.")
        return
    found = [list(_partition(name, [row for row in rows if row[0] == name], request)) for name in wanted]
    if all(found):  # of several partitions Slurm takes one that fits
        yield from itertools.chain(*found)
    yield from _account(request)


def _partition(wanted: str, mine: list[list[str]], request: Request) -> Iterator[Finding]:
    """Why the job does not fit a partition, whose nodes ``mine`` are rows of sinfo."""
    if all(row[4] != "up" for row in mine):
        yield Finding("slurm.partition", "error", f"The partition {wanted} is {mine[0][4]}.", "Choose another.")
    longest = seconds_of(mine[0][1])
    if request.time_limit is not None and longest is not None and request.time_limit > longest:
        cause = f"--time of {duration(request.time_limit)} is over the limit of {wanted}, {duration(longest)}."
        yield Finding("slurm.time", "error", cause, "Lower it: the run goes on by itself in the next allocation.")
    nodes = sum(int(row[2]) for row in mine)
    if request.nodes[0] > nodes:
        cause = f"{request.nodes[0]} nodes are asked for, and {wanted} has {nodes}."
        yield Finding("slurm.nodes", "error", cause, "Ask for fewer, or take another partition.")
    gpus = [int(found) for row in mine for found in re.findall(r"gpu(?::[^:,()]+)?:(\d+)", row[3])]
    if request.gpus and gpus and request.ranks_per_node > max(gpus):
        cause = f"{request.ranks_per_node} ranks a node are asked for, and nodes of {wanted} have {max(gpus)} GPUs."
        yield Finding("slurm.gpus", "error", cause, "Start at most one rank for each GPU.")


def _account(request: Request) -> Iterator[Finding]:
    if request.account is None or not have("sacctmgr"):
        return
    try:
        listing = ("--parsable2", "--noheader", "format=account")
        shown = run("sacctmgr", "show", "associations", f"user={getpass.getuser()}", *listing)
    except HeadraceError:
        return  # no accounting here: sbatch will say it
    if (known := sorted(set(shown.split()))) and request.account not in known:
        cause = f"{getpass.getuser()} has no account {request.account!r}."
        yield Finding("slurm.account", "error", cause, f"Known: {', '.join(known)}.")


def _default_partition() -> list[str]:
    """The cluster's, if it has one."""
    return re.findall(r"PartitionName=(\S+).* Default=YES", run("scontrol", "--oneliner", "show", "partition"))


def seconds_of(text: str) -> float | None:
    """Slurm's ``MINUTES``, ``[HOURS:]MINUTES:SECONDS`` or ``DAYS-HOURS[:MINUTES[:SECONDS]]``; None for no limit.

    Raises:
        ValueError: it is none of these.
    """
    if text.lower() in ("infinite", "unlimited", "n/a"):
        return None
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 1:
        hours, minutes, seconds = 0, parts[0], 0
    else:
        hours, minutes, seconds = [0, *parts][-3:]
    return float(((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds)
