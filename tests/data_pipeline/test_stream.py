"""Settings of what a run reads that can't be, refused where they stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.prepare import PrepareSettings, prepare
from data_pipeline.settings import build_settings
from data_pipeline.stream import StreamSettings, open_stream
from data_pipeline.testing import tiny_tokenizer, write_token_dataset
from tests.http_server import HttpServer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream") / "data"
    documents = np.random.default_rng(0).integers(4, 300, (60, 50)).tolist()
    write_token_dataset(folder, {("a", "train"): documents}, block_tokens=64)
    return folder


def settings(path: str, **changes: Any) -> StreamSettings:
    plain = {"seq_len": 16, "sources": {"a": {"path": path, "domain": "a"}}, **changes}
    return build_settings(StreamSettings, plain, "test")


def test_windows_are_sequences_of_the_runs_length(folder: Path) -> None:
    stream = open_stream(settings(str(folder), order="windowed", windows={"strata": 2, "tokens": 64}), 1)
    first, stop = stream.order.window(0, np.arange(stream.sources[0].sequences))
    assert (stop - first).max() == 4
    assert settings("x", order="windowed").order_windows is not None
    assert settings("x").order_windows is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": {"strata": 2}}, "windows has no meaning in the order full; set order: windowed"),
        (
            {"order": "windowed", "windows": {"tokens": 100}},
            r"tokens 100 is not a multiple of seq_len 16; .* 96",
        ),
        ({"order": "windows"}, "did you mean 'windowed'"),
        ({"on_damage": "skip"}, "on_damage"),
        (
            {"phases": [{"start": 3, "weights": {"b": 1}}]},
            r"phase at 3 weighs \['b'\], but the sources are \['a'\]",
        ),
    ],
)
def test_settings_that_contradict(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings("x", **changes)


def test_a_cache_that_would_fetch_again_and_again(folder: Path, tmp_path: Path) -> None:
    """190 sequences, 3 a stratum of 3: a window of 16 tokens touches up to two blocks of 64 + 1, each 1,024 bytes."""
    cache = {"folder": str(tmp_path), "bytes": 5_000}
    windowed = {"order": "windowed", "windows": {"strata": 3, "tokens": 16}, "cache": cache}
    with HttpServer(folder) as server:
        with pytest.raises(UserError, match=r"cache.bytes = 5,000 is too small.*order full draws from all.*windowed"):
            open_stream(settings(server.url, cache=cache), 1)
        with pytest.raises(UserError, match=r"a window of each stratum at a time.*takes 6,144 bytes on this node"):
            open_stream(settings(server.url, **windowed), 1)
        open_stream(settings(server.url, **windowed), 1, share=(0, 2))
        with pytest.raises(UserError, match=r"takes 6,144 bytes on this node"):
            open_stream(settings(server.url, **windowed), 1, share=(0, 2), ranks_of_node=2)
    with pytest.raises(UserError, match=r"a window of each stratum at a time"):
        open_stream(settings(f"pipe:cat {folder}/{{}}", **windowed), 1, share=(0, 2))  # whole shards only
    open_stream(settings(str(folder), cache=cache), 1)


def test_errors_name_the_source(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data.sources.a: .*nowhere"):
        open_stream(settings("nowhere"), 1)


def test_packed_rows_are_not_cut(tmp_path: Path) -> None:
    records = "".join(json.dumps({"text": f"document {row} " * 5}) + "\n" for row in range(50))
    (tmp_path / "a.jsonl").write_text(records)
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer().model)
    prepared = {
        "output": str(tmp_path / "packed"),
        "tokenizer": {"path": str(tmp_path / "tokenizer.model")},
        "sources": {"a": {"kind": "jsonl", "domain": "a", "files": [str(tmp_path / "a.jsonl")]}},
        "block_tokens": 512,
        "packing": "best_fit",
        "pack_tokens": 128,
        "processes": 1,
    }
    prepare(build_settings(PrepareSettings, prepared, "test"))
    open_stream(settings(str(tmp_path / "packed"), seq_len=256), 1)
    with pytest.raises(UserError, match=r"data.sources.a: .* packed in rows of 128 tokens.*64 would cut.*of 128"):
        open_stream(settings(str(tmp_path / "packed"), seq_len=64), 1)
