"""Commands: the exit status counts, but never at the price of bytes that came before; closing kills."""

from __future__ import annotations

import io
import time
from pathlib import Path

import psutil
import pytest

from data_pipeline.errors import EXIT_CRASH, UserError
from data_pipeline.storage import RemoteSettings, StorageError, StorageSettings, open_input, open_store

QUICK = StorageSettings(remote=RemoteSettings(attempts=3, first_backoff_seconds=0.01, deadline_seconds=1.0))
LINES = "seq 100000"
EXPECTED = b"".join(b"%d\n" % number for number in range(1, 100_001))


class TestStatus:
    def test_all_good_bytes_come_before_the_error(self) -> None:
        with open_input(f"pipe:{LINES}; echo broken pump >&2; exit 3", QUICK) as stream:
            assert stream.read(len(EXPECTED) + 10) == EXPECTED
            for _ in range(2):  # an error that was raised once is not forgotten
                with pytest.raises(StorageError, match=r"exit status 3 and said: broken pump") as caught:
                    stream.read(10)
        assert caught.value.start == len(EXPECTED)
        assert caught.value.exit_code == EXIT_CRASH

    def test_all_whole_lines_come_before_the_error(self) -> None:
        with open_input(f"pipe:{LINES}; exit 1", QUICK) as stream:
            assert b"".join(next(stream) for _ in range(EXPECTED.count(b"\n"))) == EXPECTED
            with pytest.raises(StorageError, match="exit status 1"):
                next(stream)

    def test_failure_within_a_pipeline_counts(self) -> None:
        with open_input(f"pipe:({LINES}; exit 4) | cat", QUICK) as stream:
            assert stream.read() == EXPECTED
            with pytest.raises(StorageError, match="exit status 4"):
                stream.read()

    def test_a_killed_command_is_an_error(self) -> None:
        with open_input(f"pipe:{LINES}; kill -9 $$", QUICK) as stream:
            assert stream.read() == EXPECTED
            with pytest.raises(StorageError, match="killed by signal 9"):
                stream.read()

    def test_silence_is_an_error(self) -> None:
        began = time.monotonic()
        with open_input("pipe:echo first; sleep 60", QUICK) as stream:
            assert stream.read(6) == b"first\n"
            with pytest.raises(StorageError, match="printed nothing for 1 s"):
                stream.read(6)
        assert time.monotonic() - began < 10

    def test_output_closed_but_still_running_is_an_error(self) -> None:
        with open_input("pipe:echo first; exec >&-; sleep 60", QUICK) as stream:
            assert stream.read(6) == b"first\n"
            with pytest.raises(StorageError, match="closed its output but still ran 1 s later"):
                stream.read(6)

    def test_no_command(self) -> None:
        with pytest.raises(UserError, match="names no command"):
            open_input("pipe: ", QUICK).read()


class TestClosing:
    def test_kills_everything_the_command_started(self, tmp_path: Path) -> None:
        note = tmp_path / "pid"
        head = b"ready, and long enough for a head\n"  # a shorter one is held back until the command is given up
        stream = open_input(f"pipe:sleep 300 & echo $! > {note}; echo {head.decode().strip()}; wait", QUICK)
        assert stream.read(len(head)) == head
        sleeper = psutil.Process(int(note.read_text()))
        assert is_alive(sleeper)
        stream.close()
        deadline = time.monotonic() + 5
        while is_alive(sleeper):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


class TestRepeating:
    """A root's command is run again, which a reader of whole files can allow."""

    def flaky(self, folder: Path, first: str, then: str) -> str:
        return f"pipe:if mkdir {folder}/once 2>/dev/null; then {first}; exit 1; else {then}; fi; : {{}}"

    def test_takes_up_where_it_broke_off(self, tmp_path: Path) -> None:
        store = open_store(self.flaky(tmp_path, "seq 70000", LINES), QUICK)
        to = io.BytesIO()
        assert store.fetch("name", to, len(EXPECTED)) == len(EXPECTED)
        assert to.getvalue() == EXPECTED
        assert store.retries == 1

    def test_whole_read(self, tmp_path: Path) -> None:
        assert open_store(self.flaky(tmp_path, "seq 10", LINES), QUICK).read("name") == EXPECTED

    @pytest.mark.parametrize("second", ["seq 70000 | tr 1 2", "seq 100"])
    def test_other_output_the_second_time_is_refused(self, tmp_path: Path, second: str) -> None:
        store = open_store(self.flaky(tmp_path, "seq 70000", second), QUICK)
        with pytest.raises(StorageError, match="a second run printed other bytes than the first"):
            store.fetch("name", io.BytesIO())

    def test_gives_up(self, tmp_path: Path) -> None:
        runs = tmp_path / "runs"
        store = open_store(f"pipe:echo run >> {runs}; cat {tmp_path}/{{}}", QUICK)
        with pytest.raises(StorageError, match=r"No such file or directory \(attempt 3 of 3"):
            store.read("none")
        assert runs.read_text() == "run\n" * 3
        assert store.retries == 2

    def test_names_are_quoted(self, tmp_path: Path) -> None:
        (tmp_path / "a b; echo $(c)").write_bytes(b"content")
        assert open_store(f"pipe:cat {tmp_path}/{{}}", QUICK).read("a b; echo $(c)") == b"content"
