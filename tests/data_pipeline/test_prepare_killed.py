"""A `prepare` that is killed, or stopped: what is done stays, and nothing outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import data_pipeline.prepare.run
from data_pipeline.errors import HeadraceError, UserError
from data_pipeline.prepare.workers import run_jobs
from tests.data_pipeline.prepared import hashes, make_texts, plain_settings, run


@pytest.fixture
def plain(tmp_path: Path) -> dict[str, Any]:
    """Two domains of about ten parts and eight shards."""
    sources = {"first": ("prose", make_texts(300, 1)), "second": ("verse", make_texts(120, 2))}
    return {**plain_settings(tmp_path, sources), "shard_tokens": 6000, "part_bytes": 8000}


def test_a_killed_worker_is_explained(plain: dict[str, Any]) -> None:
    with pytest.raises(HeadraceError, match=r"a worker process was killed .* it continues"):
        run_jobs(_die, [1, 2], 2, "die", "job", int)


def _die(job: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _published(pattern: str, count: int) -> Callable[[Path], bool]:
    return lambda folder: len(list(folder.glob(pattern))) >= count


MOMENTS = {
    "a run of a part": _published(".prepare/parts/*.tokens", 1),
    "a part": _published(".prepare/parts/000???.json", 3),
    "an archive being written": _published("shards/.*.tmp", 1),
    "a shard's archive": _published("shards/*.tar", 2),
    "a shard": _published(".prepare/shards/*.json", 4),
    "the manifest": _published("manifest.json", 1),
}


def test_a_killed_prepare_continues_to_the_same_bytes(plain: dict[str, Any], tmp_path: Path) -> None:
    run(plain)
    config = tmp_path / "killed.yaml"
    config.write_text(json.dumps({**plain, "output": str(tmp_path / "killed"), "processes": 2}))
    command = [sys.executable, "-m", "data_pipeline", "prepare", str(config)]
    for moment, reached in MOMENTS.items():
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not reached(tmp_path / "killed"):
            time.sleep(0.0005)
        process.kill()
        assert process.wait() in (-signal.SIGKILL, 0), moment
        if moment == "a shard":
            finished = [path.stem for path in (tmp_path / "killed" / ".prepare" / "shards").glob("*.json")]
            times = {name: (tmp_path / "killed" / "shards" / f"{name}.tar").stat().st_mtime_ns for name in finished}
    (tmp_path / "killed" / "shards" / ".000000.tar.1.tmp").write_bytes(b"left over")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "set")
    kept = {name: (tmp_path / "killed" / "shards" / f"{name}.tar").stat().st_mtime_ns for name in times}
    assert kept == times, "a finished shard was written again"
    assert sorted(path.name for path in (tmp_path / "killed" / ".prepare").iterdir()) == sorted(
        path.name for path in (tmp_path / "set" / ".prepare").iterdir()
    )


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    script = (
        "import os, time\n"
        "from data_pipeline.prepare.workers import run_jobs\n"
        "from tests.data_pipeline.test_prepare_killed import _sleep\n"
        f"if __name__ == '__main__': run_jobs(_sleep, [{str(tmp_path)!r}] * 2, 2, 'sleep', 'job', len)\n"
    )
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    parent = subprocess.Popen([sys.executable, tmp_path / "script.py"], env=environment, stderr=subprocess.DEVNULL)
    while len(pids := [int(path.suffix[1:]) for path in tmp_path.glob("worker.*")]) < 2:
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.01)


def _sleep(folder: str) -> None:
    (Path(folder) / f"worker.{os.getpid()}").touch()
    time.sleep(600)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_part_that_has_its_record_is_not_read_again(plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A prepare stopped between the passes goes on without the first."""

    def full_disk(folder: Path, needed: int) -> None:
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(data_pipeline.prepare.run, "_check_space", full_disk)
    with pytest.raises(UserError, match=r"set: No space left on device \(.*set\)\. Mend that and start the same"):
        run(plain)
    monkeypatch.undo()
    records = {path: path.stat().st_mtime_ns for path in (Path(plain["output"]) / ".prepare" / "parts").iterdir()}
    assert records
    monkeypatch.setattr(data_pipeline.prepare.run.shutil, "rmtree", lambda path: None)
    run(plain)
    assert {path: path.stat().st_mtime_ns for path in records} == records
