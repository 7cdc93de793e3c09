"""A run from remote storage is the run from the local disk, bit for bit, through faults, and fetches things once."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.http_server import Faults, HttpServer

from .runs import Runs, environment

ORDER = {"order": "windowed", "windows": {"strata": 4, "tokens": 256}}


def data(root: str, cache: Path, **settings: Any) -> dict[str, Any]:
    sources = {
        "a": {"path": root, "domain": "a", "max_epochs": None},
        "b": {"path": root, "domain": "b", "max_epochs": None, "weight": 0.5},
    }
    remote = {"first_backoff_seconds": 0.01, "longest_backoff_seconds": 0.05}
    return {"sources": sources, "cache": {"folder": str(cache)}, "remote": remote, **settings}


@pytest.mark.slow
def test_windows_over_http(runs: Runs, tmp_path: Path) -> None:
    local = runs.config("local", data=data(str(runs.data), tmp_path / "unused", **ORDER))
    assert runs.train(local).returncode == 0
    with HttpServer(runs.data, Faults(latency=0.01, error_rate=0.1, early_close_rate=0.05)) as server:
        remote = runs.config("remote", data=data(server.url, tmp_path / "cache", **ORDER))
        killed = runs.train(remote, fault="step:9")
        assert killed.returncode != 0
        done = runs.train(remote)
    assert done.returncode == 0, done.stderr
    assert runs.metrics("remote") == runs.metrics("local")
    assert runs.state_hashes("remote", 20) == runs.state_hashes("local", 20)
    assert server.faulty > 0, "nothing went wrong, so nothing was tried again"
    ranges = [wanted for method, path, wanted in server.log if method == "GET" and path.endswith(".tar")]
    answered = len(ranges) - server.faulty
    assert answered <= len(set(ranges)) + server.faulty, "a window was fetched by both ranks, or by both attempts"
    assert not (tmp_path / "unused").exists()


@pytest.mark.slow
def test_whole_shards_from_a_command(runs: Runs, tmp_path: Path) -> None:
    local = runs.config("local")
    assert runs.train(local, ranks=1).returncode == 0
    root = f"pipe:cat {runs.data}/{{}}"
    piped = runs.config("piped", data=data(root, tmp_path / "cache"))
    assert runs.train(piped, ranks=1).returncode == 0
    assert runs.metrics("piped") == runs.metrics("local")
    refused = runs.train(piped, "data.secure=true", "run.name=secure", ranks=1)
    assert refused.returncode != 0
    assert re.search(r"pipe:.*secure", refused.stderr)


@pytest.mark.slow
def test_a_stop_does_not_wait_for_data_that_does_not_come(runs: Runs, tmp_path: Path) -> None:
    """The server falls silent in mid-run; SIGTERM ends the run, saved, long before the deadline of the read."""
    settings = data("", tmp_path / "cache", prefetch=1, watchdog_seconds=2.0, **ORDER)
    with HttpServer(runs.data) as server:
        for source in settings["sources"].values():
            source["path"] = server.url
        config = runs.config(
            "stalled", data=settings, evaluation={"every_steps": None}, checkpoint={"every_steps": None}
        )
        shards = [f"shards/{shard.name}" for shard in (runs.data / "shards").glob("*.tar")]
        for shard in shards:
            server.plan(shard, *["ok"] * 9, *["stall"] * 100)
        command = [sys.executable, "-m", "pretrain", "train", str(config)]
        with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as running:
            deadline, steps = time.monotonic() + 120, -1
            while time.monotonic() < deadline:
                time.sleep(4)
                now = len(runs.metrics("stalled")) if runs.run_folder("stalled").exists() else 0
                if now == steps > 0:
                    break
                steps = now
            running.send_signal(signal.SIGTERM)
            asked = time.monotonic()
            stderr = running.communicate(timeout=100)[1]
        took = time.monotonic() - asked
    assert running.returncode == 75, stderr
    assert 0 < steps < 20
    assert took < 30, "it waited for the server"
    assert f"saved at step {steps}" in stderr
    assert re.search(r"warning: rank 0 .* waits for data .*source '[ab]' has been waiting for .* s for block", stderr)
    assert runs.state_hashes("stalled", steps)
