"""The data set folder while it is being written: its lock, its leftovers, and what an earlier start was told to do."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, UserError
from ..layout import MANIFEST_FILE, REJECTED_FOLDER, SHARD_FOLDER, SHARD_TABLE_FILE, TOKENIZER_FILE
from ..sources.inputs import stamp_difference
from .checked_files import DamagedFileError, publish_record, read_record
from .claims import PATIENCE_SECONDS, Share, claim


class BegunOtherwiseError(UserError):
    """An earlier start was told something else."""


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
    def duplicates(self) -> Path:
        """What was found out about duplicates, between the passes."""
        return self.work / "duplicates"

    @property
    def part_records(self) -> Path:
        """The completion records of all parts in one file: made when all parts are done."""
        return self.work / "part_records.json"

    @property
    def shard_plan(self) -> Path:
        """What goes into which shard: made when all parts are done."""
        return self.work / "shard_plan.json"

    @property
    def shard_runs(self) -> Path:
        """The runs by split and domain, for the processes that write shards."""
        return self.work / "shard_runs.json"

    @property
    def passing(self) -> tuple[Path, ...]:
        """Folders that go when the data set is complete."""
        return self.parts, self.duplicates, self.shard_records, self.claims

    @property
    def claims(self) -> Path:
        """Locks on what is being written at the moment."""
        return self.work / "claims"

    def leftovers(self) -> Iterator[Path]:
        """Temporary files of killed starts; what else lies in the folder belongs to somebody else."""
        for place, pattern in (
            (self.folder, f".{TOKENIZER_FILE}.*.tmp"),
            (self.folder, f".{MANIFEST_FILE}.*.tmp"),
            (self.folder, f".{SHARD_TABLE_FILE}.*.tmp"),
            *((folder, ".*.tmp") for folder in (self.folder / SHARD_FOLDER, self.folder / REJECTED_FOLDER)),
            (self.work, "**/.*.tmp"),
        ):
            yield from place.glob(pattern)

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of the data set."""
        return self.folder / TOKENIZER_FILE

    @property
    def tokenizer_hash(self) -> Path:
        """The SHA-256 of the tokenizer that was put there."""
        return self.work / "tokenizer_sha256.json"

    @property
    def begun(self) -> bool:
        """Whether something is made that hangs on what was agreed on."""
        made = (self.folder / MANIFEST_FILE, self.part_records, self.shard_plan)
        work = ((self.parts, "??????.json"), (self.duplicates, "*"), (self.shard_records, "*.json"))
        return any(path.exists() for path in made) or any(any(folder.glob(name)) for folder, name in work)

    def written_anew(self, error: DamagedFileError) -> DataError:
        """The error for the user of a file that is not as it was written. Where that file can be written again, which
        gives the same bytes, the record that says it is done is taken away, so that the next start does it."""
        record = self._record_of(error.path)
        if record is not None:
            record.unlink(missing_ok=True)
            return DataError(
                f"{error} Nothing was published. Look after the disk and start the same command again (with tasks: "
                "all of them): what the file held is made again."
            )
        if (self.folder / MANIFEST_FILE).exists():
            return DataError(
                f"{error} The data set {self.folder} is complete without it, but what it was made from can't be "
                "compared any more. Use it as it is, or give another `output`."
            )
        return DataError(f"{error} Nothing was published. Delete {self.folder} and prepare again.")

    def _record_of(self, path: Path) -> Path | None:
        """The record of the work that wrote ``path``; nothing where it says what was asked for."""
        if path.parent == self.parts and path.suffix == ".drop":
            return self.duplicates / "duplicates.json"
        if path.parent == self.parts:
            return self.parts / f"{path.name[:6]}.json"
        if path == self.shard_runs:
            return self.shard_plan
        if path.parent in self.passing or path in (self.part_records, self.shard_plan):
            return path
        return None

    def withdraw(self, tokenizer: bool) -> None:
        """Take back what a start was told that has made nothing, so that the next one may be told something else.

        Args:
            tokenizer: the start has put the tokenizer there, too. One that was trained stays, with what it is of.
        """
        if self.begun:
            return
        for record in ("plan", "versions"):
            (self.work / f"{record}.json").unlink(missing_ok=True)
        told = self.work / "tokenizer.json"
        if tokenizer and told.exists() and read_record(told)["tokenizer"]["train"] is None:
            self.tokenizer.unlink(missing_ok=True)
        if not self.tokenizer.exists():
            told.unlink(missing_ok=True)
            self.tokenizer_hash.unlink(missing_ok=True)

    def agree(self, record: str, wanted: dict[str, Any], share: Share) -> None:
        """Publish ``wanted`` as ``.prepare/RECORD.json``, or check that the one of an earlier start equals it.

        Raises:
            BegunOtherwiseError: names what differs.
            DamagedFileError: the record is not as it was written, or it is missing and work was done by it.
        """
        path = self.work / f"{record}.json"
        with claim(self.claims, f"the {record} record", share, wait=True):
            if not path.exists() and not self.begun:
                publish_record(path, wanted)
                return
        differences = list(_differences(read_record(path), json.loads(json.dumps(wanted)), ""))
        if differences:
            more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
            raise BegunOtherwiseError(
                f"{self.folder} was begun with something else: {'; '.join(differences[:3])}{more}. Give another "
                "`output` folder, delete this one, or change that back."
            )


@contextmanager
def open_workspace(folder: Path, share: Share | None = None) -> Iterator[Workspace]:
    """Make and lock the data set folder for writing; when nobody else is there, leftovers of killed starts are removed,
    and after an error of the body what it was told, if nothing was made by then.

    Args:
        folder: the data set.
        share: of a task that shares the folder with other tasks; ``None``: it is for this process alone.

    Raises:
        UserError: another process writes there (with ``share``: one that does not share, or the same task), the folder
            can't be written, or it holds a data set that was not prepared there.
    """
    workspace = Workspace(folder)
    try:
        if not workspace.work.exists() and any((folder / name).exists() for name in (MANIFEST_FILE, SHARD_FOLDER)):
            raise UserError(
                f"{folder} holds a data set that was not prepared there, or not to its end and without its `.prepare`. "
                "Give another `output`, or delete that folder."
            )
        for path in (*workspace.passing, folder / SHARD_FOLDER):
            path.mkdir(parents=True, exist_ok=True)
        lock = os.open(workspace.work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        new_tokenizer = not workspace.tokenizer.exists()
    except OSError as error:
        raise UserError(
            f"output folder {folder} can't be written: {error.strerror} ({error.filename}). "
            "Give another `output`, or mend the rights of this one."
        ) from error
    try:
        if _locked(lock, fcntl.LOCK_EX, patience=0):
            for leftover in workspace.leftovers():
                leftover.unlink()
        elif share is None:
            raise UserError(f"another process is preparing {folder}. Wait for it, or give another `output` folder.")
        if share is None:
            yield workspace
            return
        if not _locked(lock, fcntl.LOCK_SH, PATIENCE_SECONDS):
            raise UserError(
                f"a process that does not share its work (prepare without --task, or with --merge) is preparing "
                f"{folder}. Wait for it, or give another `output` folder."
            )
        with claim(workspace.claims, str(share), share):
            yield workspace
    except BegunOtherwiseError:  # by a start that was killed, and whose processes may still be at work
        raise
    except Exception:  # whatever ended the start, it is raised again; a kill takes nothing back
        if _locked(lock, fcntl.LOCK_EX, patience=0):
            workspace.withdraw(new_tokenizer)
        raise
    finally:
        os.close(lock)


def _locked(descriptor: int, kind: int, patience: float) -> bool:
    """Take the lock within ``patience`` seconds; whether that went well."""
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)


def _differences(old: Any, new: Any, key: str, last: str = "") -> Iterator[str]:
    """What differs below ``key``, the last name in which is ``last``."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            inner = f"{key}.{name}" if key else name
            if name not in new:
                yield f"{inner} was {old[name]!r}, now it is missing"
            elif name not in old:
                yield f"{inner} is new ({new[name]!r})"
            else:
                yield from _differences(old[name], new[name], inner, name)
    elif old != new:
        yield f"{key} {stamp_difference(last, old, new) or f'was {old!r}, now it is {new!r}'}"
