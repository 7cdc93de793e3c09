"""Where the blocks of a data set's shards are read: a bounded number of open files and tables of checksums."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import resource
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

import crc32c
import numpy as np
import numpy.typing as npt

from .damage import HOLES_ADVICE, DamagedBlockError, OnDamage, Reason
from .errors import DataError
from .layout import SHARD_FOLDER, BlockLayout, index_entries
from .permutation import IntArray
from .shard_table import ShardTable

_LOOKING = 8
_NAMED = 5
"""Shards that a message names one by one."""

Key = TypeVar("Key")
Value = TypeVar("Value")


Checksums = npt.NDArray[np.uint32]


def open_files_limit() -> int:
    """How many files one source keeps open: few where the process may have few (8 sources of 64 fit into 1024)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 256 if soft == resource.RLIM_INFINITY else max(16, min(256, soft // 16))


class RecentlyUsed(Generic[Key, Value]):
    """The ``limit`` values used last; ``drop`` is called with what falls out."""

    def __init__(self, limit: int, drop: Callable[[Value], None] = lambda value: None) -> None:
        self._limit, self._drop = limit, drop
        self._kept: OrderedDict[Key, Value] = OrderedDict()
        self._last: tuple[Key | None, Value | None] = None, None

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    def get(self, key: Key) -> Value | None:
        if key == self._last[0]:
            return self._last[1]
        value = self._kept.get(key)
        if value is not None:
            self._kept.move_to_end(key)
            self._last = key, value
        return value

    def put(self, key: Key, value: Value) -> Value:
        while len(self._kept) >= self._limit:
            self._drop(self._kept.popitem(last=False)[1])
        self._kept[key] = value
        self._last = key, value
        return value

    def remove(self, key: Key) -> None:
        if key in self._kept:
            self._drop(self._kept.pop(key))
        self._last = None, None

    def clear(self) -> None:
        self._last = None, None
        while self._kept:
            self._drop(self._kept.popitem()[1])


class OpenFile:
    """An open file that holds the bytes of a shard from byte ``start`` on."""

    def __init__(self, handle: BinaryIO, start: int, where: str) -> None:
        self.handle, self.start, self.where = handle, start, where
        self.descriptor = handle.fileno()

    def read(self, into: memoryview, offset: int) -> int:
        """Fill ``into`` from byte ``offset`` of the shard on; returns how many bytes there were up to the file's end.

        Raises:
            OSError: the disk failed; names the file and the byte.
        """
        done = 0
        while done < len(into):
            try:
                got = os.preadv(self.descriptor, [into[done:] if done else into], offset + done - self.start)
            except OSError as error:
                raise OSError(error.errno, f"{error.strerror} (byte {offset + done})", self.where) from error
            if got == 0:
                break
            done += got
        return done

    def close(self) -> None:
        self.handle.close()


class ShardFiles(ABC):
    """The shards of one source, by their row in its table. Not for several threads at once.

    Args:
        root: the data set, for messages.
        shards: its rows.
        layout: the arithmetic of the shards.
    """

    def __init__(self, root: str, shards: ShardTable, layout: BlockLayout) -> None:
        self.root, self.shards, self.layout = root, shards, layout
        self._checksums: RecentlyUsed[int, Checksums] = RecentlyUsed(open_files_limit())
        self._checksums_lock = threading.Lock()

    @abstractmethod
    def open(self, shard: int, block: int, span: tuple[int, int] | None) -> OpenFile:
        """The file that holds a block.

        Args:
            shard: row of the shard.
            block: the block.
            span: the blocks ``[first, stop)`` to fetch together where something must be fetched; None: all.

        Raises:
            DamagedBlockError: there is no such file.
        """

    @abstractmethod
    def again(self, shard: int, span: tuple[int, int] | None) -> bool:
        """Forget what is held of these blocks, so that it is fetched anew; False where that could change nothing."""

    @abstractmethod
    def read_index(self, shard: int) -> bytes:
        """The content of a shard's block index.

        Raises:
            FileNotFoundError: there is none.
        """

    @abstractmethod
    def sizes(self, shards: IntArray) -> IntArray:
        """The bytes of each shard's file [n]; -1 where there is none."""

    def after_fork(self) -> None:
        """Called in a forked child: the parent's threads are gone, with the locks that they held."""
        self._checksums_lock = threading.Lock()

    def check_sizes(self, rank: int, world: int, on_damage: OnDamage) -> list[str]:
        """Hold each ``world``-th shard, from row ``rank`` on, against the manifest; returns those that do not fit.

        Raises:
            DataError: some do not, and ``on_damage`` is ``"stop"``; names the first ones.
        """
        mine = np.arange(rank, len(self.shards), world)
        sizes, expected = self.sizes(mine), self.shards.bytes[mine]
        wrong = np.flatnonzero(sizes != expected)
        if on_damage == "stop" and len(wrong):
            listed = [
                f"shard {self.where(row)} "
                + (
                    f"has {size} bytes where the manifest says {self.shards.bytes[row]}"
                    if size >= 0
                    else f"is missing: the manifest lists it with {self.shards.tokens[row]} tokens"
                )
                for row, size in zip(mine[wrong[:_NAMED]].tolist(), sizes[wrong[:_NAMED]].tolist(), strict=True)
            ]
            if (more := len(wrong) - len(listed)) > 0:
                missing = int((sizes[wrong] < 0).sum())
                listed.append(f"and {more} more (in all {missing} missing, {len(wrong) - missing} of another size)")
            raise DataError(f"{'; '.join(listed)}. {self._advice} {HOLES_ADVICE}")
        return [self.where(row) for row in mine[wrong].tolist()]

    def where(self, shard: int) -> str:
        """The path or address of a shard."""
        return f"{self.root}/{SHARD_FOLDER}/{self.shards.names[shard]}.tar"

    def check(self, shard: int, block: int, content: memoryview) -> None:
        """Compare the CRC32C of a whole block with the recorded one.

        Raises:
            DamagedBlockError: they differ, or the index that records it is not the manifest's.
        """
        found, expected = crc32c.crc32c(content), int(self.checksums(shard, block)[block])
        if found != expected:
            raise self.wrong_checksum(shard, block, found, expected)

    def checksums(self, shard: int, block: int) -> Checksums:
        """The recorded CRC32C of each block of a shard; threads may call it. ``block``: what it is wanted for.

        Raises:
            DamagedBlockError: the index that records them is not the manifest's.
        """
        with self._checksums_lock:
            kept = self._checksums.get(shard)
        if kept is None:
            kept = self._read_checksums(shard, block)
            with self._checksums_lock:
                self._checksums.put(shard, kept)
        return kept

    def wrong_checksum(self, shard: int, block: int, found: int, expected: int) -> DamagedBlockError:
        """The error of a block whose CRC32C is not the recorded one."""
        what = (
            f"block {block} at byte offset {self.layout.data_offset(block)} is damaged: its CRC32C is {found:#010x}, "
        )
        return self.damage(shard, block, "checksum", f"{what}{expected:#010x} was recorded when it was written")

    def damage(self, shard: int, block: int, reason: Reason, what: str) -> DamagedBlockError:
        """The error of a block: ``what`` goes on after the name of the shard."""
        return DamagedBlockError(
            f"shard {self.where(shard)}, {what}. {self._advice}",
            self.shards.names[shard], block, self.layout.data_offset(block), reason,
        )  # fmt: skip

    @property
    def _advice(self) -> str:
        return f"Run `pretrain-data verify {self.root}` to see all damage, then restore what is wrong from a copy."

    def close(self) -> None:
        """Close the open files; a later read opens them again."""
        self._checksums.clear()

    def _read_checksums(self, shard: int, block: int) -> Checksums:
        path = self.where(shard).removesuffix(".tar") + ".idx"
        advice = f"Run `pretrain-data verify --rebuild-sidecars {self.root}` to write it again from the shard."
        where = (self.shards.names[shard], block, self.layout.data_offset(block))
        try:
            content = self.read_index(shard)
        except FileNotFoundError as error:
            raise DamagedBlockError(f"the block index {path} is missing. {advice}", *where, "index") from error
        if hashlib.sha256(content).digest() != self.shards.idx_sha256[shard].tobytes():
            message = f"the block index {path} is not the one the manifest names (its SHA-256 differs). {advice}"
            raise DamagedBlockError(message, *where, "index")
        return index_entries(content)["crc32c"].astype(np.uint32)


class LocalShards(ShardFiles):
    """Shards in a folder that this machine can read from."""

    def __init__(self, folder: Path, shards: ShardTable, layout: BlockLayout) -> None:
        super().__init__(str(folder), shards, layout)
        self._files: RecentlyUsed[int, OpenFile] = RecentlyUsed(open_files_limit(), OpenFile.close)

    def open(self, shard: int, block: int, span: tuple[int, int] | None) -> OpenFile:
        file = self._files.get(shard)
        if file is None:
            path = self.where(shard)
            try:
                file = OpenFile(io.FileIO(path), 0, path)
            except FileNotFoundError as error:
                what = f"which the manifest lists with {self.shards.tokens[shard]} tokens, is missing"
                raise self.damage(shard, block, "missing", what) from error
            self._files.put(shard, file)
        return file

    def again(self, shard: int, span: tuple[int, int] | None) -> bool:
        return False

    def read_index(self, shard: int) -> bytes:
        return Path(self.where(shard).removesuffix(".tar") + ".idx").read_bytes()

    def sizes(self, shards: IntArray) -> IntArray:
        names = self.shards.names
        folder = Path(self.root) / SHARD_FOLDER

        def measure(part: IntArray) -> list[int]:
            return [_size(f"{folder}/{names[row]}.tar") for row in part.tolist()]

        # threads for network file systems, where a look costs a round trip
        parts = np.array_split(shards, _LOOKING)
        with ThreadPoolExecutor(_LOOKING) as pool:
            return np.fromiter(itertools.chain.from_iterable(pool.map(measure, parts)), np.int64, len(shards))

    def close(self) -> None:
        super().close()
        self._files.clear()


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return -1
