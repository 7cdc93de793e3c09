"""A second place for checkpoints: a folder elsewhere, or an object store, by the rules of the first.

An object store renames nothing, so what makes a checkpoint complete here is its ``MANIFEST.json`` alone: written last,
removed first. Every file is hashed on its way, there and back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec

from data_pipeline.errors import DataError, HeadraceError, UserError
from data_pipeline.files import publish
from data_pipeline.storage import MissingFileError, open_store
from pretrain.config import CheckpointSettings
from pretrain.engine import read_layout
from pretrain.engine.layout import NAME as LAYOUT
from pretrain.engine.layout import Layout

from .manifest import NAME, FileRecord, parse_manifest

T = TypeVar("T")

_PIECE = 8 * 2**20
STATE = "state.json"


class SecondPlace:
    """The checkpoints below one address. No method is collective.

    Credentials and endpoints of an object store come from where those of data sets do (:mod:`data_pipeline.storage`).
    Errors are OSErrors, HeadraceErrors, or of the libraries below fsspec.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self._store = open_store(self.address)
        self._system: Any = None
        self._path = ""

    def complete(self) -> list[str]:
        """The names of the checkpoints that have a manifest, by rising step."""
        return [name for name in self._names() if self._store.exists(f"{name}/{NAME}")]

    def manifest(self, name: str) -> list[FileRecord]:
        """The files of a checkpoint. Raises DataError where its manifest can't be read as it was saved."""
        files = parse_manifest(self._store.read(f"{name}/{NAME}"))
        if files is None:
            raise DataError(f"{self.address}/{name}/{NAME} can't be read as it was saved")
        return files

    def put(self, folder: Path, files: list[FileRecord]) -> None:
        """Copy files of the complete checkpoint in ``folder``; it stays invisible here until :meth:`reveal`."""
        for file in files:
            digest = hashlib.sha256()
            with open(folder / file.path, "rb") as source, self._writing(f"{folder.name}/{file.path}") as target:
                while piece := source.read(_PIECE):
                    digest.update(piece)
                    target.write(piece)
            if digest.hexdigest() != file.sha256:
                raise DataError(f"{folder / file.path} has other content than when it was saved (SHA-256 differs)")

    def reveal(self, name: str, files: list[FileRecord]) -> None:
        """Write the manifest of a checkpoint whose files are all here, in their sizes."""
        for file in files:
            if (size := self._store.size(f"{name}/{file.path}")) != file.bytes:
                raise DataError(f"{self.address}/{name}/{file.path} has {size} bytes instead of {file.bytes}")
        content = {"files": [asdict(file) for file in sorted(files, key=lambda file: file.path)]}
        with self._writing(f"{name}/{NAME}") as target:
            target.write((json.dumps(content, indent=2, sort_keys=True) + "\n").encode())

    def remove_others(self, keep: Callable[[list[str]], set[str]]) -> None:
        """Remove complete checkpoints that ``keep`` does not name of them, and what was left of unfinished ones."""
        complete = self.complete()
        for name in set(self._names()) - keep(complete):
            system, path = self._open(), f"{self._path}/{name}"
            if name in complete:
                system.rm_file(f"{path}/{NAME}")
            system.rm(path, recursive=True)

    def fetch(self, name: str, file: FileRecord, to: Path) -> None:
        """Bring one file into the folder ``to``. Raises DataError where it is not as it was saved."""
        target = to / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        with publish(target) as handle:
            self._read(name, file, handle)

    def check(self, name: str, file: FileRecord) -> None:
        """Read a file. Raises DataError where it is not as it was saved."""
        self._read(name, file, None)

    def read(self, name: str) -> bytes:
        return self._store.read(name)

    def _read(self, name: str, file: FileRecord, to: BinaryIO | None) -> None:
        digest = hashlib.sha256()
        for piece in self._store.stream(f"{name}/{file.path}", file.bytes):
            digest.update(piece)
            if to is not None:
                to.write(piece)
        if digest.hexdigest() != file.sha256:
            where = f"{self.address}/{name}/{file.path}"
            raise DataError(f"{where} has other content than when it was saved (SHA-256 differs)")

    def _names(self) -> list[str]:
        """Whatever has the name of a checkpoint, by rising step."""
        system = self._open()
        with contextlib.suppress(FileNotFoundError):
            names = [path.rstrip("/").rpartition("/")[2] for path in system.ls(self._path, detail=False)]
            return sorted(name for name in names if name.startswith("step_") and name[5:].isdigit())
        return []

    def _open(self) -> Any:
        if self._system is None:
            # no caches: another attempt writes here too
            options = {"skip_instance_cache": True, "use_listings_cache": False}
            self._system, path = fsspec.core.url_to_fs(self.address, **options)
            self._path = path.rstrip("/")
        return self._system

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[BinaryIO]:
        if self._store.local is not None:  # flushed to the disk, as in the first place
            path = self._store.local / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with publish(path) as handle:
                yield handle
        else:
            with self._open().open(f"{self._path}/{name}", "wb") as handle:
                yield handle


def intact_elsewhere(address: str) -> tuple[list[FileRecord], Layout, dict[str, Any]]:
    """As :func:`~pretrain.checkpoint.folders.intact_layout`, of a checkpoint at any address; its ``state.json`` too."""
    root, _, name = address.rstrip("/").rpartition("/")
    place = SecondPlace(root)
    try:
        files = place.manifest(name)
    except MissingFileError as error:
        raise UserError(
            f"{address} is no complete checkpoint: it has no {NAME}. Give the address of a step_... folder."
        ) from error
    damage = []
    for file in files:
        try:
            place.check(name, file)
        except HeadraceError as error:
            damage.append(str(error))
    if damage:
        raise DataError(f"{address} is damaged: {'; '.join(damage)}. Use another checkpoint, or a copy of this one.")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / LAYOUT).write_bytes(place.read(f"{name}/{LAYOUT}"))
        layout = read_layout(Path(folder))
    return files, layout, json.loads(place.read(f"{name}/{STATE}"))


def second_place(settings: CheckpointSettings, run_name: str) -> SecondPlace | None:
    """The second place of a run, if it is to have one."""
    return SecondPlace(f"{settings.second.path.rstrip('/')}/{run_name}") if settings.second else None


def refuse_copies(settings: CheckpointSettings, run_name: str) -> None:
    """Before a run starts over: what an earlier one left in the second place would be taken for its own, and newer.

    Raises:
        UserError: there are checkpoints.
    """
    second = second_place(settings, run_name)
    names, failure = attempt_copy(second.complete) if second else (None, None)
    if second and (names or failure):
        raise UserError(
            f"resume=never: {second.address} {failure or f'holds {len(names or [])} checkpoints of an earlier run'}. "
            "Remove them, or choose another checkpoint.second.path or run.name."
        )


def fetch_all(second: SecondPlace, name: str, files: Sequence[FileRecord], to: Path) -> None:
    for file in files:
        second.fetch(name, file, to)


def failure_of(action: Callable[[], object]) -> str | None:
    """Why ``action`` failed; None where it did not."""
    return attempt_copy(action)[1]


def attempt_copy(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """What ``action`` returns, or why it failed: libraries below fsspec raise errors of any kind."""
    try:
        return action(), None
    except Exception as error:  # noqa: BLE001  # told, with its kind, where it is decided what follows
        return None, str(error) if isinstance(error, HeadraceError) else f"{type(error).__name__}: {error}"
