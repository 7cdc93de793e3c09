"""`prepare` of what lies on a server or comes from a command: the same shards, and no secret in the manifest."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from data_pipeline.errors import UserError
from data_pipeline.prepare import PrepareSettings, Share, prepare, prepare_share
from data_pipeline.settings import build_settings
from data_pipeline.testing import tiny_tokenizer
from tests.http_server import Faults, HttpServer


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(3):
        records = [json.dumps({"text": f"document {number} {row} " * 9}) for row in range(40)]
        (folder / f"{number}.jsonl").write_text("\n".join(records) + "\n")
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer().model)
    return folder


def settings(texts: Path, output: Path, *files: str, **changes: Any) -> PrepareSettings:
    plain = {
        "output": str(output),
        "tokenizer": {"path": str(texts / "tokenizer.model")},
        "sources": {"web": {"kind": "jsonl", "domain": "web", "files": list(files)}},
        "block_tokens": 64,
        "shard_tokens": 2000,
        "processes": 1,
        "remote": {"first_backoff_seconds": 0.01, "longest_backoff_seconds": 0.02},
    }
    return build_settings(PrepareSettings, {**plain, **changes}, "test")


def test_the_same_shards_from_anywhere_and_no_token_kept(texts: Path, tmp_path: Path) -> None:
    local = prepare(settings(texts, tmp_path / "local", f"{texts}/*.jsonl"))
    with HttpServer(texts, Faults(error_rate=0.2, early_close_rate=0.1, seed=3)) as server:
        served = prepare(settings(texts, tmp_path / "served", f"{server.url}/{{0..2}}.jsonl?token=hush"))
        assert server.faulty > 0
    piped = prepare(settings(texts, tmp_path / "piped", *(f"pipe:cat {texts}/{number}.jsonl" for number in range(3))))
    assert local.identity == served.identity == piped.identity
    manifest = (tmp_path / "served" / "manifest.json").read_text()
    assert "/{0..2}.jsonl" in manifest
    assert "hush" not in manifest


class _WithoutTags(SimpleHTTPRequestHandler):
    """Of the standard library: says when a file was modified."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("tags", [True, False], ids=["ETag", "Last-Modified"])
def test_a_file_that_the_server_changed_between_two_starts_is_told(texts: Path, tmp_path: Path, tags: bool) -> None:
    """Though it is as long as it was."""
    folder = tmp_path / "served"
    shutil.copytree(texts, folder)
    with ExitStack() as stack:
        if tags:
            url = stack.enter_context(HttpServer(folder)).url
        else:
            server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_WithoutTags, directory=str(folder)))
            Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            url = f"http://127.0.0.1:{server.server_port}"
        wanted = settings(texts, tmp_path / "set", f"{url}/{{0..2}}.jsonl")
        prepare_share(wanted, Share(0, 3))
        path = folder / "2.jsonl"
        path.write_bytes(path.read_bytes().replace(b"document 2", b"dokument 2"))
        os.utime(path, (1_000_000_000, 1_000_000_000))
        said = rf"input\.web\.http://.*/2\.jsonl was '{path.stat().st_size} bytes, version .*', now it is '.*, version "
        with pytest.raises(UserError, match=said):
            prepare(wanted)


def test_secure_refuses_commands(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"input 'pipe:cat.* runs a command, which `secure: true` forbids"):
        prepare(settings(texts, tmp_path / "x", f"pipe:cat {texts}/0.jsonl", secure=True))
