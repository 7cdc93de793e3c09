"""The text of the contest: Python source code that every machine with Headrace has, tokenised once by our `prepare`."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline import TokenSource, read_manifest
from data_pipeline.prepare import PrepareSettings, prepare
from data_pipeline.settings import build_settings

SEQ_LEN = 4096
VOCABULARY = 16_384
DOMAIN = "code"


@dataclass(frozen=True)
class Corpus:
    """What the systems read.

    Attributes:
        text: JSON lines ``{"text", "path"}``, the input of every tokeniser.
        dataset: our data set of it.
        rows: ``.npy`` uint16 [n, SEQ_LEN + 1], each sequence with the token that follows it: what every peer's own
            format is written from.
    """

    text: Path
    dataset: Path
    rows: Path
    text_bytes: int
    documents: int
    tokens: int
    eos_id: int


def make_corpus(folder: Path, text_bytes: int) -> Corpus:
    """Write the corpus of about ``text_bytes`` of text into ``folder``, or take what is there."""
    text, dataset, rows = folder / "text.jsonl", folder / "dataset", folder / "rows.npy"
    folder.mkdir(parents=True, exist_ok=True)
    if not text.exists():
        write_text(text, text_bytes)
    if not (dataset / "manifest.json").exists():
        prepare(prepare_settings(text, dataset))
    manifest = read_manifest(dataset)
    if not rows.exists():
        with TokenSource(dataset, None, "train", SEQ_LEN) as source:
            temporary = rows.with_name(f".{rows.name}")
            with open(temporary, "wb") as handle:
                np.save(handle, source.read(np.arange(source.sequences)))
            temporary.rename(rows)
    return Corpus(
        text,
        dataset,
        rows,
        text_bytes=int(manifest.shards.text_bytes.sum()),
        documents=int(manifest.shards.documents.sum()),
        tokens=int(manifest.shards.tokens.sum()),
        eos_id=manifest.eos_id,
    )


def prepare_settings(
    text: Path, output: Path, tokenizer: Path | None = None, processes: int | None = None
) -> PrepareSettings:
    """How the corpus is prepared; with ``tokenizer``, by that model."""
    training = {"train": {"model_type": "bpe", "vocab_size": VOCABULARY, "sample_bytes": 4 << 20}}
    return build_settings(
        PrepareSettings,
        {
            "output": str(output),
            "tokenizer": training if tokenizer is None else {"path": str(tokenizer)},
            "sources": {"code": {"kind": "jsonl", "files": [str(text)], "domain": DOMAIN}},
            "heldout_fraction": 0.0,
            "shard_tokens": 4_000_000,
            "part_bytes": 16 << 20,
            **({} if processes is None else {"processes": processes}),
        },
        "benchmark",
    )


def write_text(path: Path, text_bytes: int) -> None:
    temporary = path.with_name(f".{path.name}")
    with open(temporary, "w", encoding="utf-8") as handle:
        for name, text in _python_sources(text_bytes):
            handle.write(json.dumps({"text": text, "path": name}) + "\n")
    temporary.rename(path)


def _python_sources(text_bytes: int) -> Iterator[tuple[str, str]]:
    """Different source files of the standard library and the installed packages, until ``text_bytes`` are reached."""
    paths = sysconfig.get_paths()
    seen: set[bytes] = set()
    total = 0
    for root in (Path(paths["stdlib"]), Path(paths["purelib"])):
        for path in sorted(root.rglob("*.py")):
            if root != Path(paths["purelib"]) and "site-packages" in path.relative_to(root).parts:
                continue
            content = path.read_bytes()
            digest = hashlib.sha256(content).digest()
            if not content.strip() or digest in seen:
                continue
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError:
                continue
            seen.add(digest)
            yield path.relative_to(root).as_posix(), text
            total += len(content)
            if total >= text_bytes:
                return
