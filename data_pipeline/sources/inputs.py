"""Input files: paths, globs and brace patterns on this machine, addresses and `pipe:` commands anywhere else."""

from __future__ import annotations

import glob
import io
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, BinaryIO, Final
from urllib.parse import urlsplit, urlunsplit

import braceexpand

from ..errors import DataError, UserError
from ..storage import StorageSettings, open_input, open_store
from ..storage.remote import RemoteStore, Version
from ..storage.store import PIPE, scheme
from .unpacking import (
    DAMAGE,
    SUFFIXES,
    Packing,
    carries_checksum,
    foreign_packing,
    name_unpacked,
    packing_of_content,
    packing_of_name,
    unpacked,
)

DEFAULT_STORAGE: Final = StorageSettings()

_BUFFER_BYTES: Final = 1 << 20
_HEAD_BYTES: Final = 16
_KINDS: Final = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".tar": "webdataset", ".arrow": "datasets",
}  # fmt: skip
_OTHER_BACKSLASH: Final = re.compile(r"\\(?![{},])")
_FILE_STAMP: Final = re.compile(r"(\d+) bytes, modified at (\d+) ns")
_ADDRESS_OF_A_FILE: Final = re.compile(r"(?P<root>[^?#]*/)(?P<name>[^/?#%]+)")


def is_remote(name: str) -> bool:
    """Whether ``name`` is an address (``https://``, ``s3://``) or a ``pipe:`` command, not a path."""
    return scheme(name) != ""


def can_be_cut(name: str) -> bool:
    """Whether a process can begin to read in the middle: packed and remote files are read whole."""
    return not is_remote(name) and packing_of_name(name) is None


def kind_of_name(name: str) -> str | None:
    """The kind of source that a file is for by its name, packed or not; None where the name leaves it open."""
    path = "" if name.startswith(PIPE) else urlsplit(name).path if is_remote(name) else name
    return _KINDS.get(os.path.splitext(name_unpacked(path))[1])


def find_inputs(patterns: Sequence[str], owner: str, storage: StorageSettings) -> list[str]:
    """The files and addresses that ``patterns`` name, each once, sorted; ``owner`` is named in errors.

    Raises:
        UserError: a pattern that names no file, can't be understood, or is not allowed.
    """
    found: set[str] = set()
    for pattern in (pattern.removeprefix("file://") for pattern in patterns):
        if os.path.isfile(pattern):
            found.add(pattern)
            continue
        for name in _expand_braces(pattern, owner):
            if is_remote(name):
                found.add(_allowed(name, owner, storage))
                continue
            matches = [path for path in glob.glob(name, recursive=True) if os.path.isfile(path)]
            if not matches:
                inside = f" but a folder ({os.path.join(name, '*')!r} names its files)" if os.path.isdir(name) else ""
                raise UserError(
                    f"input {name!r} ({owner}) names no file{inside}, seen from {os.getcwd()}. Mend `files` in the "
                    "configuration."
                )
            found.update(matches)
    return _each_once(sorted(found))


def input_versions(names: Sequence[str], storage: StorageSettings) -> list[Version]:
    """Size of each input as it is stored, and what else its server says of it; 0 bytes for a command, whose output has
    no size before it is read.

    Raises:
        UserError: an address can't be opened with what is installed.
        StorageError: a remote file is missing, or the storage does not tell its size.
    """
    stores: dict[str, RemoteStore] = {}
    with ThreadPoolExecutor(storage.remote.parallel) as threads:
        versions: list[Version | Future[Version]] = []
        for name in names:
            if not is_remote(name):
                versions.append(Version(os.path.getsize(name)))
            elif name.startswith(PIPE):
                versions.append(Version(0))
            else:
                # one store, so one pool of connections, for all files of a folder; an address that has more to it
                # than folder and name (a query, escapes) is a store of its own
                parts = _ADDRESS_OF_A_FILE.fullmatch(name)
                root, file = (parts["root"], parts["name"]) if parts else (name, "")
                if root not in stores:
                    store = open_store(root, storage)
                    assert isinstance(store, RemoteStore)  # all that are neither folders nor commands
                    stores[root] = store
                versions.append(threads.submit(stores[root].version, file))
        asked = [version for version in versions if not isinstance(version, Version)]
        done = wait(asked, return_when=FIRST_EXCEPTION).done
        if failures := [failure for version in asked if version in done and (failure := version.exception())]:
            threads.shutdown(cancel_futures=True)  # or a server that is down would be asked for every file in turn
            raise failures[0]
        return [version if isinstance(version, Version) else version.result() for version in versions]


def shown_name(name: str) -> str:
    """``name`` for documents and messages: an address without login and query, which may hold secrets."""
    if not is_remote(name) or name.startswith(PIPE):
        return name
    parts = urlsplit(name)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def input_stamp(name: str, version: Version | None = None) -> str:
    """What shows that an input changed: size and time of a file; of what is remote the ``version``: its size, and its
    tag or time if the server gives one."""
    if version and is_remote(name):
        known = version.tag or version.modified
        if not version.size:
            return "of unknown size"
        return f"{version.size} bytes" + (f", version {known}" if known else "")
    status = os.stat(name)
    return f"{status.st_size} bytes, modified at {status.st_mtime_ns} ns"


def stamp_difference(name: str, was: Any, now: Any) -> str | None:
    """In words what differs between two stamps of a file of this machine, and what can be done if only its time does;
    ``None`` if they are something else."""
    old, new = (_FILE_STAMP.fullmatch(stamp) if isinstance(stamp, str) else None for stamp in (was, now))
    if old is None or new is None:
        return None
    if old[1] != new[1]:
        return f"had {int(old[1]):,} bytes, now it has {int(new[1]):,}"
    before, after = (divmod(int(stamp[2]), 1_000_000_000) for stamp in (old, new))
    return (
        f"still has {int(old[1]):,} bytes, but was modified at {_utc(*after)} and not at {_utc(*before)} (if it holds "
        f"what it held, `touch -d @{before[0]}.{before[1]:09d} {shlex.quote(name)}` gives it its time back)"
    )


def _utc(seconds: int, nanoseconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{nanoseconds:09d} UTC"


@contextmanager
def open_input_file(name: str, storage: StorageSettings, recognise: bool = False) -> Iterator[BinaryIO]:
    """The unpacked bytes of a path, an address or a ``pipe:`` command.

    What is packed is known by the end of its name, or by its first bytes: those of commands, of addresses whose name
    says nothing, and where ``recognise`` is set. The end of the stream is the end of the input: a transfer cut short
    or a command that failed is an error, too.

    Raises:
        UserError: the input can't be opened.
        DataError: (also inside the block) what is packed is cut short or damaged, or can't be read to its end.
    """
    with _open(name, storage) as stream:
        packing = packing_of_input(name)
        head = stream.peek(_HEAD_BYTES)[:_HEAD_BYTES]
        found = packing_of_content(head)
        if not head and (packing or recognise or name.startswith(PIPE)):
            raise empty_input(name)
        if foreign := foreign_packing(head):
            raise DataError(
                f"{shown_name(name)}: is packed with {foreign}, which is not read. Pack it with zstd or gzip."
            )
        if packing is not None and found != packing:
            raise DataError(f"{shown_name(name)}: is not packed with {packing}, as its name says. Fetch it again.")
        if packing is None and found is not None and not (recognise or is_remote(name)):
            advice = f"Rename it so that its name ends in {SUFFIXES[found]}."
            raise DataError(f"{name}: is packed with {found}, and its name does not say so. {advice}")
        if packing is None:
            packing = found
        content = unpacked(stream, packing) if packing else stream
        try:
            yield content
        except DAMAGE as error:
            place = f"{shown_name(name)}: damaged after {content.tell()} unpacked bytes"
            raise DataError(f"{place} ({error}). Fetch it again.") from error
        except OSError as error:
            place = f"input {shown_name(name)} can't be read to its end"
            raise DataError(f"{place}: {error.strerror or error}. Look after its disk.") from error


def packing_of_input(name: str) -> Packing | None:
    """How an input is packed, by its name; that of a command says nothing of what it prints (`pipe:zcat a.gz`)."""
    return None if name.startswith(PIPE) else packing_of_name(name)


def has_checksum(name: str) -> bool:
    """Whether an input is surely packed with a checksum; of what is remote only the name is looked at."""
    packing = packing_of_input(name)
    if packing is None or is_remote(name):
        return packing == "gzip"
    with _open(name, DEFAULT_STORAGE) as stream:
        return carries_checksum(packing, stream)


def empty_input(name: str) -> DataError:
    """The error for an input without a byte, where there should at least be a header."""
    return DataError(f"{shown_name(name)}: is empty (0 bytes). Fetch it again, or take it out of `files`.")


def _open(name: str, storage: StorageSettings) -> io.BufferedReader:
    if is_remote(name):
        return open_input(name, storage)
    try:
        return io.BufferedReader(io.FileIO(name), _BUFFER_BYTES)
    except OSError as error:
        raise UserError(f"input file {name} can't be read: {error.strerror}. Mend its path or its rights.") from error


def _each_once(names: Sequence[str]) -> list[str]:
    """``names`` without those of a file that a name before it names: ``./a``, ``a`` and a link to it are one file."""
    folders: dict[str, str] = {}
    kept: dict[str, str] = {}
    for name in names:
        place = name
        if not is_remote(name):
            folder, base = os.path.split(name)
            if folder not in folders:
                folders[folder] = os.path.realpath(folder)
            place = os.path.join(folders[folder], base)
            place = os.path.realpath(place) if os.path.islink(place) else place
        kept.setdefault(place, name)
    return list(kept.values())


def _expand_braces(pattern: str, owner: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    try:
        # a backslash only stands for the braces and commas of the pattern: in a command it may be anybody's else
        return list(braceexpand.braceexpand(_OTHER_BACKSLASH.sub(r"\\\\", pattern)))
    except ValueError as error:
        raise UserError(
            f"input {pattern!r} ({owner}): {error}. Write `{{000..127}}` or `{{a,b}}`, and `\\{{` for a brace itself."
        ) from error


def _allowed(name: str, owner: str, storage: StorageSettings) -> str:
    if storage.secure and name.startswith(PIPE):
        raise UserError(
            f"input {name!r} ({owner}) runs a command, which `secure: true` forbids. Name its output instead."
        )
    if "*" in name and not name.startswith(PIPE):
        raise UserError(
            f"input {name!r} ({owner}): remote folders are not listed, so `*` finds nothing there. Name the files, "
            "with brace patterns (`{000..127}`) where they are many."
        )
    return name
