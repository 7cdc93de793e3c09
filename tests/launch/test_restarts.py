"""Whether a run is started again, from what attempts of every kind leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.restarts import Verdict, culprits, judge, reached, read_reports
from pretrain.monitor import Attempt, AttemptsLog, read_attempts
from pretrain.monitor.attempts import Reason


def attempt(
    folder: Path,
    first: int,
    last: int | None,
    reason: Reason | None = "crash",
    message: str = "",
    world_size: int = 1,
    guilty: tuple[int, ...] = (),
) -> Attempt:
    """One start and, unless it was killed, one stop."""
    log = AttemptsLog(folder)
    number = log.start(hosts=["n1"], world_size=world_size, versions={}, first_step=first, resumed_from=None)
    if reason and last is not None:
        codes = {"done": 0, "stopped": 75, "user_error": 2}
        code = codes.get(reason, 1)
        log.stop(number, last_step=last, reason=reason, exit_code=code, message=message, guilty=guilty)
    return read_attempts(folder)[-1]


def metrics(folder: Path, last: int) -> None:
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, last + 1)))


def verdict(folder: Path, before: int = 0, **options: Any) -> Verdict:
    return judge(folder, before, **{"asked": False, "crashes": 3, **options})


@pytest.mark.parametrize(
    ("reason", "action", "code"),
    [
        ("done", "done", 0),
        ("stopped", "requeue", 75),
        ("user_error", "stop", 2),
        ("non_finite", "stop", 1),
        ("unstable", "stop", 1),
        ("rolled_back", "again", 1),
        ("crash", "again", 1),
    ],
)
def test_reasons(tmp_path: Path, reason: Reason, action: str, code: int) -> None:
    attempt(tmp_path, 1, 10, reason, "what was said")
    found = verdict(tmp_path)
    assert (found.action, found.exit_code, found.exclude) == (action, code, ())


def test_after_the_run_went_back_by_itself_a_crash_is_judged_by_what_was_gained_since(tmp_path: Path) -> None:
    attempt(tmp_path, 1, 20, "rolled_back")
    attempt(tmp_path, 9, 12)
    assert verdict(tmp_path, 1).action == "again"
    attempt(tmp_path, 9, 12)
    assert verdict(tmp_path, 2).action == "stop"
    attempt(tmp_path, 9, 30, "rolled_back")
    attempt(tmp_path, 9, 12)
    assert verdict(tmp_path, 4).action == "again", "since it last went back"


def test_a_crash_goes_on_only_where_a_step_was_gained_that_no_attempt_had_reached(tmp_path: Path) -> None:
    attempt(tmp_path, 1, 10)
    attempt(tmp_path, 5, 9)
    found = verdict(tmp_path, 1)
    assert (found.action, found.exit_code) == ("stop", 1)
    assert "no step beyond 10, the furthest so far" in found.why
    attempt(tmp_path, 5, 11)
    assert verdict(tmp_path, 2).action == "again"
    assert verdict(tmp_path, 2, asked=True).action == "requeue"
    assert reached(tmp_path, read_attempts(tmp_path)) == [10, 9, 11]


def test_killed_attempts_count_by_their_metrics(tmp_path: Path) -> None:
    attempt(tmp_path, 1, None, None)
    metrics(tmp_path, 7)
    assert verdict(tmp_path).action == "again"
    log = AttemptsLog(tmp_path)  # the next one resumed from step 4 and cut three lines off
    log.start(hosts=["n1"], world_size=1, versions={}, first_step=5, resumed_from="x", superseded_lines=3, lost_steps=3)
    metrics(tmp_path, 4)
    assert reached(tmp_path, read_attempts(tmp_path)) == [7, 4]
    assert verdict(tmp_path, 1).action == "stop"
    metrics(tmp_path, 8)
    assert verdict(tmp_path, 1).action == "again"


def test_after_a_lost_node_it_goes_on_whatever_was_gained(tmp_path: Path) -> None:
    attempt(tmp_path, 1, 10)
    attempt(tmp_path, 1, 10)
    assert verdict(tmp_path, 1).action == "stop"
    assert verdict(tmp_path, 1, lost="n2").action == "again"
    assert verdict(tmp_path, 1, lost="n2", asked=True).action == "requeue", "this allocation is at its end"


def test_crashes_in_a_row_are_capped_whatever_they_gain(tmp_path: Path) -> None:
    for number in range(1, 4):
        attempt(tmp_path, number, number)
        assert verdict(tmp_path, number - 1).action == "again"
    attempt(tmp_path, 4, 4)
    assert "crash 4 in a row, and 3 are allowed" in verdict(tmp_path, 3).why
    attempt(tmp_path, 5, 5, "stopped")
    attempt(tmp_path, 6, 6)
    assert verdict(tmp_path, 5).action == "again", "a stop on request ends the row"


def test_an_attempt_that_recorded_nothing(tmp_path: Path) -> None:
    attempt(tmp_path, 1, 3, "stopped")
    assert verdict(tmp_path, 1).action == "stop"
    asked = verdict(tmp_path, 1, asked=True)
    assert (asked.action, asked.exit_code) == ("requeue", 75)


def report(folder: Path, node: int, code: int, time: float, told: str | None = None) -> None:
    said = f"rank {node} on n{node}" if told is None else told
    content = {"node": f"n{node}", "code": code, "time": time, "told": said, "exit_code": 1}
    (folder / f"node_{node:05d}.json").write_text(json.dumps(content))


def test_the_node_whose_rank_failed_first_is_the_culprit_where_hardware_is_named(tmp_path: Path) -> None:
    def found(message: str, nodes: tuple[str, ...] = ("n0", "n1", "n2")) -> tuple[str, ...]:
        return culprits(read_reports(tmp_path), attempt(tmp_path, 1, 5, message=message), nodes)

    report(tmp_path, 0, 1, 100.0)
    report(tmp_path, 1, -7, 101.0, "rank 1 was killed by SIGBUS")  # found a second later
    report(tmp_path, 2, 0, 0.0, "")
    assert [found["node"] for found in read_reports(tmp_path)] == ["n1", "n0", "n2"]
    assert found("") == ("n1",)
    report(tmp_path, 1, -15, 101.0, "rank 1 was killed by SIGTERM")  # by its agent, after another had failed
    assert [found["node"] for found in read_reports(tmp_path)] == ["n0", "n1", "n2"]
    report(tmp_path, 1, -9, 101.0, "rank 1 was killed by SIGKILL, often for lack of memory")
    assert found("Connection closed by peer") == ()
    report(tmp_path, 1, 1, 99.0)
    assert found("CUDA error: uncorrectable ECC error encountered") == ("n1",)
    assert found("uncorrectable ECC error", nodes=("n1",)) == (), "it is the only node"


def test_the_nodes_of_the_ranks_that_a_hang_waited_for_are_left_out(tmp_path: Path) -> None:
    """Two ranks a node; the agent of a node that is stopped whole writes no report."""
    report(tmp_path, 0, 1, 100.0)
    nodes = ("a", "b", "c", "d")
    for number, (guilty, excluded) in enumerate(
        [((), ()), ((5,), ("c",)), ((6, 7), ("d",)), ((0, 7), ("a", "d")), ((0, 3, 7), ())], start=1
    ):
        attempt(tmp_path, number, number, message="no step ended for 600 s", world_size=8, guilty=guilty)
        found = verdict(tmp_path, number - 1, reports=read_reports(tmp_path), nodes=nodes, crashes=9)
        assert (found.action, found.exclude) == ("requeue" if excluded else "again", excluded)
        assert found.why.endswith(f"it goes on, without the node {' and '.join(excluded)}" if excluded else "goes on")
    alone = verdict(tmp_path, 4, reports=read_reports(tmp_path), nodes=("a",), crashes=9)
    assert (alone.action, alone.exclude) == ("again", ()), "a job of one node has no other"
