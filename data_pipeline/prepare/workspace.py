"""The data set folder while it is being written: its lock, its leftovers, and what an earlier start was told to do."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import publish_json
from ..layout import MANIFEST_FILE, SHARD_FOLDER, TOKENIZER_FILE


@dataclass(frozen=True)
class Workspace:
    """Paths inside one data set folder. ``.prepare`` holds everything that is not the data set itself."""

    folder: Path

    @property
    def work(self) -> Path:
        """Records of what is done; what is large in it goes when the data set is complete."""
        return self.folder / ".prepare"

    @property
    def parts(self) -> Path:
        """Tokenised runs and the completion record of each part (pass 1)."""
        return self.work / "parts"

    @property
    def shard_records(self) -> Path:
        """The completion record of each shard (pass 2)."""
        return self.work / "shards"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of the data set."""
        return self.folder / TOKENIZER_FILE

    def agree(self, record: str, wanted: dict[str, Any]) -> None:
        """Publish ``wanted`` as ``.prepare/RECORD.json``, or check that the one of an earlier start equals it.

        Raises:
            UserError: names what differs.
        """
        path = self.work / f"{record}.json"
        if not path.exists():
            publish_json(path, wanted)
            return
        differences = list(_differences(json.loads(path.read_bytes()), json.loads(json.dumps(wanted)), ""))
        if differences:
            more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
            raise UserError(
                f"{self.folder} was begun with something else: {'; '.join(differences[:3])}{more}. Give another "
                "`output` folder, delete this one, or change that back."
            )


@contextmanager
def open_workspace(folder: Path) -> Iterator[Workspace]:
    """Make and lock the data set folder for writing; leftovers of a killed start are removed.

    Raises:
        UserError: another process writes there, the folder can't be written, or it holds a data set that was not
            prepared there.
    """
    workspace = Workspace(folder)
    try:
        if not workspace.work.exists() and any((folder / name).exists() for name in (MANIFEST_FILE, SHARD_FOLDER)):
            raise UserError(f"{folder} holds a data set that was not prepared there. Give another `output` folder.")
        for path in (workspace.parts, workspace.shard_records, folder / SHARD_FOLDER):
            path.mkdir(parents=True, exist_ok=True)
        lock = os.open(workspace.work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"output folder {folder} can't be written: {error.strerror} ({error.filename}). "
            "Give another `output`, or mend the rights of this one."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise UserError(
            f"another process is preparing {folder}. Wait for it, or give another `output` folder."
        ) from error
    try:
        for leftover in folder.rglob(".*.tmp"):
            leftover.unlink()
        yield workspace
    finally:
        os.close(lock)


def _differences(old: Any, new: Any, key: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            inner = f"{key}.{name}" if key else name
            if name not in new:
                yield f"{inner} was {old[name]!r}, now it is missing"
            elif name not in old:
                yield f"{inner} is new ({new[name]!r})"
            else:
                yield from _differences(old[name], new[name], inner)
    elif old != new:
        yield f"{key} was {old!r}, now it is {new!r}"
