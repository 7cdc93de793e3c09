"""Files that are complete or invisible: what is flushed to the disk, and when."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipeline.files import publish, publish_bytes


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flush = tmp_path / "made", os.fsync
    path.write_bytes(b"old")
    flushed: list[tuple[bytes, bytes]] = []

    def watched(descriptor: int) -> None:
        flush(descriptor)
        of = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        flushed.append((b"folder" if of == tmp_path else of.read_bytes(), path.read_bytes()))

    monkeypatch.setattr(os, "fsync", watched)
    publish_bytes(path, b"new content")
    assert flushed == [(b"new content", b"old"), (b"folder", b"new content")]
    assert os.listdir(tmp_path) == ["made"]


def test_a_body_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "made"
    path.write_bytes(b"old")

    def fail() -> None:
        with publish(path) as handle:
            handle.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["made"]
