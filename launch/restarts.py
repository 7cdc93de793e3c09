"""Whether a run that has ended is started again: one rule for all launchers, from what the run left behind.

=============  ======================================================================================================
it ended       then
=============  ======================================================================================================
done           nothing more to do
stopped        on request, after saving: it goes on
user_error     never again by itself: the same configuration and data would fail again
non_finite,    never again by itself: the same samples would give the same loss
unstable
rolled_back    killed while it went back to a checkpoint by itself: it goes on from there
a node lost    it goes on, whatever it gained
crash, hang,   it goes on from the newest checkpoint if this attempt did a step that none before it had done, and if
killed         there were not too many crashes in a row; without the nodes whose fault it was, where they are known
=============  ======================================================================================================
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_pipeline.errors import EXIT_CRASH, EXIT_DONE, EXIT_STOPPED, EXIT_USER_ERROR
from pretrain.monitor import Attempt, read_attempts, read_metrics

MAX_CRASHES = 5
"""Crashes in a row after which a run is not started again, whatever it gained."""

SAME_LOOK_SECONDS = 5
"""What agents find within it may have happened in any order."""

_HARDWARE = re.compile(
    r"uncorrectable (ECC|NVLink)|hardware error|fallen off the bus|Bus error|GPU is lost|unknown error.*CUDA|"
    r"device not ready|Xid",
    re.IGNORECASE,
)
"""Words of drivers and libraries for a device that is broken, not misused."""


@dataclass(frozen=True)
class Verdict:
    """What to do after an attempt. ``again`` in the same allocation, ``requeue`` in a new one."""

    action: Literal["done", "again", "requeue", "stop"]
    exit_code: int
    why: str
    exclude: tuple[str, ...] = ()
    """The nodes whose fault it was, as far as that can be known: not to be used again."""


def judge(
    folder: Path,
    before: int,
    *,
    asked: bool,
    reports: Sequence[dict[str, Any]] = (),
    crashes: int,
    lost: str = "",
    nodes: Sequence[str] = (),
) -> Verdict:
    """What to do after the attempts of the run in ``folder`` beyond the first ``before``.

    Args:
        folder: of the run.
        before: attempts that were there when this one was started.
        asked: it was asked to stop, so that the allocation comes to its end.
        reports: of the nodes (:func:`read_reports`).
        crashes: in a row, after which a run is given up.
        lost: names of nodes that Slurm has lost meanwhile.
        nodes: names of those that the attempt ran on, in the order of their ranks, each with equally many.
    """
    attempts = read_attempts(folder)
    if len(attempts) <= before:
        if asked:
            return Verdict("requeue", EXIT_STOPPED, "it was asked to stop before it had begun")
        if lost:
            return Verdict("again", EXIT_CRASH, f"{lost} was lost before it had begun")
        told = "; ".join(report["told"] for report in reports if report["told"])
        return Verdict("stop", EXIT_CRASH, f"it ended before it could record a start{f' ({told})' if told else ''}")
    last = attempts[-1]
    if last.reason == "done":
        return Verdict("done", EXIT_DONE, f"done at step {last.last_step:,}")
    if last.reason == "stopped":
        return Verdict("requeue", EXIT_STOPPED, f"stopped on request at step {last.last_step:,}, saved")
    if last.reason == "user_error":
        return Verdict("stop", EXIT_USER_ERROR, f"configuration or data are wrong: {last.message}")
    if last.reason in ("non_finite", "unstable"):
        return Verdict("stop", EXIT_CRASH, f"the same step would fail again: {last.message}")
    if last.reason == "rolled_back":
        return Verdict("requeue" if asked else "again", EXIT_CRASH, f"ended while it went back: {last.message}")
    if lost:
        return Verdict("requeue" if asked else "again", EXIT_CRASH, f"{lost} was lost: it goes on with what is left")
    return _after_crash(folder, attempts, asked, reports, crashes, nodes)


def _after_crash(
    folder: Path,
    attempts: list[Attempt],
    asked: bool,
    reports: Sequence[dict[str, Any]],
    allowed: int,
    nodes: Sequence[str],
) -> Verdict:
    # what was done before the run last went back by itself says nothing about what it gains since
    turns = [number for number, attempt in enumerate(attempts[:-1], start=1) if attempt.reason == "rolled_back"]
    attempts = attempts[turns[-1] if turns else 0 :]
    furthest, last = reached(folder, attempts), attempts[-1]
    told = "; ".join(report["told"] for report in reports if report["told"])
    why = f"{last.ended}: {last.message or told or 'nothing was recorded'}"
    best = max([last.first_step - 1, *furthest[:-1]])
    if furthest[-1] <= best:
        return Verdict(
            "stop", EXIT_CRASH, f"{why}. It did no step beyond {best:,}, the furthest so far, so it would crash again."
        )
    row = _crashes_in_a_row(attempts)
    if row > allowed:
        return Verdict("stop", EXIT_CRASH, f"{why}. That was crash {row} in a row, and {allowed} are allowed.")
    guilty = culprits(reports, last, nodes)
    why += f". It reached step {furthest[-1]:,}, {furthest[-1] - best:,} beyond the furthest before: it goes on"
    if guilty:
        return Verdict("requeue", EXIT_CRASH, f"{why}, without the node {' and '.join(guilty)}", guilty)
    return Verdict("requeue" if asked else "again", EXIT_CRASH, why)


def _crashes_in_a_row(attempts: list[Attempt]) -> int:
    """Attempts at the end that crashed or were killed."""
    count = 0
    for attempt in reversed(attempts):
        if attempt.reason not in (None, "crash"):
            break
        count += 1
    return count


def reached(folder: Path, attempts: Sequence[Attempt]) -> list[int]:
    """The last step that each attempt did: as it recorded, as the next one found it, or as metrics.jsonl has it."""
    found = [attempt.last_step or 0 for attempt in attempts]
    for number, following in enumerate(attempts[1:]):
        if following.superseded_lines or following.lost_steps:
            found[number] = max(found[number], following.first_step - 1 + following.lost_steps)
    if attempts and attempts[-1].last_step is None:
        steps = [line["step"] for line in read_metrics(folder)]
        found[-1] = max([attempts[-1].first_step - 1, *steps])
    return found


def read_reports(logs: Path) -> list[dict[str, Any]]:
    """What the agents of the nodes wrote when they ended, the node whose rank failed first in front."""
    reports = [json.loads(path.read_bytes()) for path in sorted(logs.glob("node_*.json"))]
    began = min((report["time"] for report in reports if report["told"]), default=0.0)

    def order(report: dict[str, Any]) -> tuple[bool, bool, float]:
        # a rank that was killed is found dead together with those that lost their connection to it
        killed = report["code"] < 0 and report["code"] != -signal.SIGTERM
        return not report["told"], not (killed and report["time"] <= began + SAME_LOOK_SECONDS), report["time"]

    return sorted(reports, key=order)


def culprits(reports: Sequence[dict[str, Any]], last: Attempt, nodes: Sequence[str]) -> tuple[str, ...]:
    """The nodes that broke; none where that is not known, or where no half of the nodes would be left.

    Those of the ranks that the others waited for, as the hanging run itself has found, or the one whose rank failed
    first, in words of broken hardware or by SIGBUS. A node that Slurm itself has lost needs no naming: Slurm does not
    use it again.

    Args:
        reports: of the nodes' agents, the first to fail in front.
        last: the attempt that ended.
        nodes: that it ran on, in the order of their ranks.
    """
    first = reports[0] if reports else None
    if last.guilty:
        found = {nodes[rank * len(nodes) // last.world_size] for rank in last.guilty} if nodes else set()
    elif first and first["told"] and ("SIGBUS" in first["told"] or _HARDWARE.search(last.message)):
        found = {str(first["node"])}
    else:
        return ()
    return tuple(sorted(found)) if 2 * len(found) <= len(nodes) else ()
