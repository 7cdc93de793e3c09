"""A server that is down when a command starts: told soon, and by name, though running reads are patient."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import EXIT_CRASH, UserError
from data_pipeline.settings import build_settings
from data_pipeline.storage import RemoteSettings, StorageError, StorageSettings, check_answers, impatient, open_store
from data_pipeline.stream import StreamSettings, open_stream
from tests.data_pipeline.prepared import make_texts, plain_settings, run
from tests.http_server import HttpServer

PATIENCE = 120.0
REMOTE = {"start_seconds": 0.5, "deadline_seconds": PATIENCE, "first_backoff_seconds": 0.01, "parallel": 2}
STORAGE = StorageSettings(remote=RemoteSettings.model_validate(REMOTE))


@pytest.fixture
def dead() -> Iterator[str]:
    """An address at which nobody listens; nobody else can take it meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def refused_soon(command: Callable[[], Any], address: str) -> None:
    began = time.monotonic()
    with pytest.raises(StorageError) as caught:
        command()
    assert time.monotonic() - began < PATIENCE / 2, "the patience of running reads"
    assert str(caught.value).startswith(address)
    assert "; the next one would come after the 0.5 s it may take)" in str(caught.value)
    assert "A start waits for `remote.start_seconds` = 0.5 s" in str(caught.value)
    assert (caught.value.transient, caught.value.exit_code) == (True, EXIT_CRASH), "worth another start"


def test_a_run_whose_server_is_down(dead: str) -> None:
    sources = {"a": {"path": f"{dead}/set"}, "b": {"path": f"{dead}/other"}}
    settings = build_settings(StreamSettings, {"seq_len": 16, "sources": sources, "remote": REMOTE}, "test")
    refused_soon(lambda: open_stream(settings, 1), f"{dead}/set/manifest.json: no answer: ")


def test_a_prepare_whose_server_is_down_asks_for_no_file_after_the_first(dead: str, tmp_path: Path) -> None:
    plain = plain_settings(tmp_path, {"a": ("one", make_texts(9, 1))})
    source = {**plain["sources"]["a"], "files": [f"{dead}/{{000..400}}.jsonl"]}
    refused_soon(lambda: run(plain, sources={"a": source}, remote=REMOTE), f"{dead}/0")


def test_a_server_that_says_something_is_left_to_those_who_read(tmp_path: Path) -> None:
    with HttpServer(tmp_path) as server:
        check_answers([server.url, server.url, f"{server.url}/nowhere"], "manifest.json", STORAGE)
        assert [path for _, path, _ in server.log] == ["manifest.json", "nowhere/manifest.json"], "each root once"
        sources = {"a": {"path": f"{server.url}/nowhere"}}
        settings = build_settings(StreamSettings, {"seq_len": 16, "sources": sources, "remote": REMOTE}, "test")
        with pytest.raises(UserError, match=r"data\.sources\.a: .*no such file"):
            open_stream(settings, 1)


def test_folders_and_commands_are_not_asked(tmp_path: Path) -> None:
    check_answers([str(tmp_path / "none"), f"file://{tmp_path}/none", "pipe:false {}"], "manifest.json", STORAGE)


def test_only_what_is_asked_at_the_start_is_impatient(dead: str) -> None:
    with impatient(STORAGE) as hurried:
        assert hurried.remote.deadline_seconds == 0.5
        assert hurried.model_copy(update={"remote": STORAGE.remote}) == STORAGE
    with impatient(StorageSettings(remote=RemoteSettings(deadline_seconds=3, start_seconds=9))) as hurried:
        assert hurried.remote.deadline_seconds == 3
    few = STORAGE.model_copy(update={"remote": STORAGE.remote.model_copy(update={"attempts": 2})})
    with pytest.raises(
        StorageError, match=r"\(attempt 2 of 2, [\d.]+ s\)\. .* or raise `remote\.attempts` and `remote"
    ):
        open_store(dead, few).size("a")
