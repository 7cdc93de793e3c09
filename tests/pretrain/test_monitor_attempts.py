"""attempts.jsonl: what a launcher reads after every process is gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from pretrain.monitor import AttemptsLog, read_attempts

START = {"hosts": ["node1", "node2"], "world_size": 16, "versions": {"torch": "2.13.0", "headrace": "0.1.0"}}


def start(log: AttemptsLog, first_step: int, lost_steps: int = 0) -> int:
    resumed_from = None if first_step == 1 else f"step_{first_step - 1:09d}"
    return log.start(**START, first_step=first_step, resumed_from=resumed_from, lost_steps=lost_steps)


def test_starts_are_joined_with_their_stops(tmp_path: Path) -> None:
    assert read_attempts(tmp_path) == []
    log = AttemptsLog(tmp_path)
    assert start(log, 1) == 1
    log.stop(1, last_step=40, reason="stopped", exit_code=75, signal="SIGTERM", message="saved step 40")
    assert start(AttemptsLog(tmp_path), 41) == 2  # killed: no stop
    third = AttemptsLog(tmp_path)
    assert start(third, 41, lost_steps=7) == 3
    third.stop(3, last_step=50, reason="non_finite", exit_code=1, message='the loss is "nan"')
    assert start(AttemptsLog(tmp_path), 51) == 4

    first, second, last, running = read_attempts(tmp_path)
    assert [attempt.ended for attempt in (first, second, last, running)] == [
        "stopped (SIGTERM)",
        "killed (no stop was recorded)",
        "non-finite",
        "killed (no stop was recorded)",
    ]
    assert (first.hosts, first.world_size, first.versions["torch"]) == (("node1", "node2"), 16, "2.13.0")
    assert (first.first_step, first.last_step, first.exit_code, first.message) == (1, 40, 75, "saved step 40")
    assert first.stopped is not None
    assert first.started <= first.stopped <= second.started
    assert (second.resumed_from, second.last_step, second.stopped) == ("step_000000040", None, None)
    assert (last.lost_steps, last.message) == (7, 'the loss is "nan"')


def test_a_half_written_line_neither_hurts_the_reader_nor_the_next_line(tmp_path: Path) -> None:
    log = AttemptsLog(tmp_path)
    start(log, 1)
    with open(log.path, "ab") as handle:
        handle.write(b'{"event": "stop", "att')
    assert len(read_attempts(tmp_path)) == 1
    assert start(AttemptsLog(tmp_path), 1) == 2
    assert [attempt.number for attempt in read_attempts(tmp_path)] == [1, 2]


def test_a_stop_without_its_start_is_refused_with_its_line(tmp_path: Path) -> None:
    log = AttemptsLog(tmp_path)
    start(log, 1)
    log.stop(2, last_step=1, reason="done", exit_code=0)
    with pytest.raises(UserError, match=r"attempts\.jsonl, line 2: .*a stop lacks its start \(2 is missing\)"):
        read_attempts(tmp_path)


def test_only_known_reasons_are_recorded(tmp_path: Path) -> None:
    log = AttemptsLog(tmp_path)
    with pytest.raises(
        ValueError, match="'bored' is not one of done, stopped, user_error, crash, non_finite, unstable, rolled_back"
    ):
        log.stop(start(log, 1), last_step=1, reason="bored", exit_code=1)  # type: ignore[arg-type]


def test_an_unwritable_folder_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"attempts\.jsonl can't be written: No such file"):
        AttemptsLog(tmp_path / "absent")
