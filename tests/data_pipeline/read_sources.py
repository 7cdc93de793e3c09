"""What tests of sources share: reading all of one, and writing JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from data_pipeline.sources import Document, JsonlSource, Source

TEXTS = [f"text {i} " + "\u00e9x" * (i * 7 % 40) + "\n" * (i % 3) for i in range(50)]


def read(source: Source, part_bytes: int) -> list[tuple[str, str]]:
    records = [record for part in source.parts(part_bytes) for record in source.read(part)]
    return [(record.text if isinstance(record, Document) else f"({record.reason})", record.url) for record in records]


def metadata(source: Source) -> list[object]:
    return [getattr(record, "metadata", "rejected") for part in source.parts(1 << 20) for record in source.read(part)]


def texts(documents: Iterable[tuple[str, str]]) -> list[str]:
    return [text for text, _ in documents]


def write_jsonl(path: Path, records: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def jsonl(*files: Path, **options: object) -> JsonlSource:
    return JsonlSource.model_validate(
        {"kind": "jsonl", "domain": "d", "files": tuple(str(path) for path in files), **options}
    )
