"""What tests of `prepare` share: texts, plain settings, and what a written folder holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.manifest import Manifest, read_manifest
from data_pipeline.prepare import PrepareSettings, prepare
from data_pipeline.settings import build_settings
from data_pipeline.shard_reading import read_tokens
from data_pipeline.testing import tiny_tokenizer
from data_pipeline.tokenizer import Tokenizer

WORDS = "the quick brown fox jumps over the lazy dog and then it sleeps until morning comes".split()  # noqa: SIM905


def make_texts(count: int, seed: int) -> list[str]:
    """``count`` different texts of 1 to 60 words."""
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(1, 60))) + f" {seed}.{i}" for i in range(count)]


def write_jsonl(path: Path, texts: Sequence[str]) -> None:
    """One object with a ``text`` a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def plain_settings(folder: Path, sources: Mapping[str, tuple[str, Sequence[str]]]) -> dict[str, Any]:
    """Settings with a data set ``folder/set``, small blocks and a ready tokenizer, after writing the input.

    Args:
        sources: domain and texts of each; the file is ``folder/NAME.jsonl``.
    """
    (folder / "given.model").write_bytes(tiny_tokenizer().model)
    described = {}
    for name, (domain, texts) in sources.items():
        path = folder / f"{name}.jsonl"
        write_jsonl(path, texts)
        described[name] = {"kind": "jsonl", "domain": domain, "files": [str(path)]}
    return {
        "output": str(folder / "set"),
        "tokenizer": {"path": str(folder / "given.model")},
        "sources": described,
        "heldout_fraction": 0.1,
        "block_tokens": 64,
        "shard_tokens": 2500,
        "part_bytes": 4000,
        "processes": 1,
    }


def build(plain: Mapping[str, Any], **changes: Any) -> PrepareSettings:
    """Checked settings."""
    return build_settings(PrepareSettings, {**plain, **changes}, "test")


def run(plain: Mapping[str, Any], **changes: Any) -> Manifest:
    """A plain `prepare`."""
    return prepare(build(plain, **changes))


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a data set."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".prepare" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def stored(folder: Path, domain: str, split: str) -> list[str]:
    """The texts of a (domain, split) as the shards hold them, in order, found by EOS alone."""
    manifest, tokenizer = read_manifest(folder), Tokenizer.load(folder / "tokenizer.model")
    texts: list[str] = []
    for shard in manifest.select(domain, split):
        ids = read_tokens(folder, manifest, shard)
        ends = np.flatnonzero(ids == tokenizer.eos_id)
        texts += [tokenizer.decode(piece) for piece in np.split(ids[: ends[-1]], ends[:-1] + 1)]
    return texts
