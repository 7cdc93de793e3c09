"""A checkpoint's MANIFEST.json: every file with its size and hash, written last (law 4)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.errors import DataError, UserError
from data_pipeline.files import publish_json, sha256_file

NAME = "MANIFEST.json"


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint: path relative to its folder, size in bytes, hex SHA-256."""

    path: str
    bytes: int
    sha256: str


def record_file(folder: Path, path: Path) -> FileRecord:
    """The record of a file below ``folder``, read back from what was written."""
    return FileRecord(path.relative_to(folder).as_posix(), path.stat().st_size, sha256_file(path))


def write_manifest(folder: Path, files: Sequence[FileRecord]) -> None:
    """Publish the marker that makes ``folder`` a complete checkpoint."""
    publish_json(folder / NAME, {"files": [asdict(file) for file in sorted(files, key=lambda file: file.path)]})


def read_manifest(folder: Path) -> list[FileRecord] | None:
    """The files of a checkpoint; None where there is no marker or it can't be read: not a complete checkpoint."""
    try:
        return parse_manifest((folder / NAME).read_bytes())
    except OSError:
        return None


def parse_manifest(content: bytes) -> list[FileRecord] | None:
    """The files that a manifest names; None where it is none."""
    try:
        return [FileRecord(**file) for file in json.loads(content)["files"]]
    except (ValueError, TypeError, KeyError):
        return None


def problems(folder: Path, files: Sequence[FileRecord], hashes: bool) -> list[str]:
    """What is wrong with ``files`` of a checkpoint, one sentence each; empty when all is as recorded.

    Args:
        hashes: also read every byte; without it only presence and size are looked at.
    """
    found = []
    for file in files:
        path = folder / file.path
        try:
            size = path.stat().st_size
            if size != file.bytes:
                found.append(f"{path} has {size} bytes instead of {file.bytes}")
            elif hashes and sha256_file(path) != file.sha256:
                found.append(f"{path} has other content than when it was saved (SHA-256 differs)")
        except OSError as error:
            found.append(f"{path} can't be read: {error.strerror}")
    return found


def intact(folder: Path) -> list[FileRecord]:
    """The files of a checkpoint, after every byte of them was compared with the manifest.

    Raises:
        UserError: ``folder`` has no readable manifest, so it is no complete checkpoint.
        DataError: a file is missing or not as it was saved.
    """
    files = read_manifest(folder)
    if files is None:
        raise UserError(
            f"{folder} is no complete checkpoint: it has no readable {NAME}. Give the path of a step_... folder."
        )
    if found := problems(folder, files, hashes=True):
        raise DataError(f"{folder} is damaged: {'; '.join(found)}. Use another checkpoint, or a copy of this one.")
    return files
