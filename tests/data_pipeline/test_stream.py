"""Settings of what a run reads that can't be, refused where they stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.layout import nearest_divisors
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
        (
            {"sources": {"a": {"path": "x"}, "b": {"path": "y", "weight": 0.0}}},
            "source 'b' has weight 0 in every phase, so nothing of it would ever be read; take it out",
        ),
    ],
)
def test_settings_that_contradict(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings("x", **changes)


def test_a_source_that_a_later_phase_reads_may_have_weight_0() -> None:
    sources = {"a": {"path": "x"}, "b": {"path": "y", "weight": 0.0}}
    settings("x", sources=sources, phases=[{"start": 3, "weights": {"a": 0.0, "b": 1.0}}])


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
    for wrong, nearest in ((64, "128"), (32, "128"), (2, "128")):
        told = rf"data.sources.a: .* in rows of 128 tokens.* of {wrong} would cut .*Set data\.seq_len to {nearest}, or"
        with pytest.raises(UserError, match=told):
            open_stream(settings(str(tmp_path / "packed"), seq_len=wrong), 1)


@pytest.mark.parametrize(
    ("total", "wanted", "multiple_of", "nearest"),
    [(512, 100, 1, "64 or 128"), (512, 128, 1, "128 or 256"), (512, 600, 1, "512"), (512, 64, 128, "128"),
     (48, 20, 4, "16 or 24"), (65_536, 4_095, 2, "2048 or 4096"), (7, 3, 1, "1 or 7")],
)  # fmt: skip
def test_nearest_divisors(total: int, wanted: int, multiple_of: int, nearest: str) -> None:
    """Against trying every number."""
    valid = [n for n in range(1, total + 1) if total % n == 0 and n % multiple_of == 0]
    expected = [*[n for n in valid if n <= wanted][-1:], *[n for n in valid if n > wanted][:1]]
    assert nearest_divisors(total, wanted, multiple_of) == nearest == " or ".join(map(str, expected))
