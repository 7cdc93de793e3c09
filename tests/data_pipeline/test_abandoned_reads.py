"""Reads that nobody waits for end with what they were for: they hold up neither a close nor the end of a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.reader import TokenSource
from data_pipeline.storage import CacheSettings, RemoteSettings, StorageError, StorageSettings
from data_pipeline.testing import write_token_dataset
from tests.http_server import HttpServer

SEQ, PATIENCE = 16, 600.0
"""Seconds that a read has, and a wait between attempts may take; pytest's own limit is shorter."""

CHILD = """
import sys
import numpy as np
from data_pipeline.errors import UserError, run_command
from data_pipeline.reader import TokenSource
from data_pipeline.storage import StorageSettings

def app():
    source = TokenSource(sys.argv[1], "web", "train", 16, storage=StorageSettings.model_validate_json(sys.argv[2]))
    sequences = np.arange(source.sequences)
    source.fetch_ahead(sequences, np.stack([sequences // 8 * 8, sequences // 8 * 8 + 8]))
    print("fetching", flush=True)
    sys.stdin.readline()
    if sys.argv[3] == "interrupt":
        raise KeyboardInterrupt
    raise UserError("something else is wrong")

sys.exit(run_command(app))
"""


@pytest.fixture(params=["http", "pipe"])
def gone(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, StorageSettings]]:
    """A data set whose manifest can be read, and whose shards can't: a server in trouble, a command that hangs."""
    folder = tmp_path / "data"
    write_token_dataset(folder, {("web", "train"): [[7] * 200] * 3}, block_tokens=64)
    remote = RemoteSettings(
        deadline_seconds=PATIENCE, first_backoff_seconds=PATIENCE, longest_backoff_seconds=PATIENCE, parallel=2
    )
    storage = StorageSettings(remote=remote, cache=CacheSettings(folder=str(tmp_path / "cache")))
    if request.param == "pipe":
        yield f"pipe:case {{}} in *.tar) sleep {PATIENCE};; *) cat {folder}/{{}};; esac", storage
        return
    with HttpServer(folder) as server:
        server.plan("shards/000000.tar", *["error"] * 1000)
        yield server.url, storage


@pytest.mark.parametrize("how", ["error", "interrupt"])
def test_the_end_of_a_process_does_not_wait_for_them(gone: tuple[str, StorageSettings], how: str) -> None:
    root, storage = gone
    command = [sys.executable, "-c", CHILD, root, storage.model_dump_json(), how]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "fetching\n"
        try:
            stderr = child.communicate("\n", timeout=60)[1]
        finally:
            child.kill()
    assert child.returncode == (2 if how == "error" else -signal.SIGINT), stderr
    assert ("something else is wrong" if how == "error" else "KeyboardInterrupt") in stderr
    assert not [name for name in os.listdir(f"{storage.cache.folder}/entries") if name.endswith(".part")]


def closed_while_it_reads(source: TokenSource) -> StorageError:
    """What a read of the source's first sequence ends with when another thread closes it meanwhile."""
    failures: list[StorageError] = []

    def read() -> None:
        try:
            source.read_or_damage(np.array([0]))
        except StorageError as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    while source.reading is None:
        time.sleep(0.01)
    source.close()
    reader.join()
    (failure,) = failures
    return failure


def test_a_close_ends_them_and_later_reads_are_as_ever(gone: tuple[str, StorageSettings], tmp_path: Path) -> None:
    root, storage = gone
    source = TokenSource(root, "web", "train", SEQ, storage=storage)
    failure = closed_while_it_reads(source)
    assert failure.transient, "it says nothing about the data"
    assert "nobody waits for" in str(failure)
    if root.startswith("http"):
        with HttpServer(tmp_path / "data") as server:
            again = TokenSource(server.url, "web", "train", SEQ, storage=storage)
            again.close()
            assert np.array_equal(again.read([0]), TokenSource(tmp_path / "data", "web", "train", SEQ).read([0]))


def test_what_a_close_ended_is_no_hole_of_later_reads(tmp_path: Path) -> None:
    """A command's failure may mean a missing file, but not where nobody waited for it any more."""
    folder, go = tmp_path / "data", tmp_path / "go"
    write_token_dataset(folder, {("web", "train"): [[7] * 200] * 3}, block_tokens=64)
    root = f"pipe:case {{}} in *.tar) while [ ! -e {go} ]; do sleep 0.05; done;; esac; cat {folder}/{{}}"
    storage = StorageSettings(cache=CacheSettings(folder=str(tmp_path / "cache")))
    source = TokenSource(root, "web", "train", SEQ, storage=storage, on_damage="hole")
    assert "nobody waits for" in str(closed_while_it_reads(source))
    go.touch()
    rows, damage = source.read_or_damage(np.array([0, 1]))
    assert not damage
    assert np.array_equal(rows, TokenSource(folder, "web", "train", SEQ).read([0, 1]))
