"""Where the blocks of a data set's shards are read: a bounded number of open files and tables of checksums."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import crc32c
import numpy as np
import numpy.typing as npt

from .damage import HOLES_ADVICE, DamagedBlockError, OnDamage, Reason
from .errors import DataError
from .layout import SHARD_FOLDER, BlockLayout, index_entries
from .open_files import OpenFile, RecentlyUsed, open_files_limit
from .permutation import IntArray
from .shard_table import ShardTable

_LOOKING = 8
_NAMED = 5
"""Shards that a message names one by one."""

Checksums = npt.NDArray[np.uint32]
Found = TypeVar("Found", int, bool)


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
    def read_index(self, shard: int, block: int) -> bytes:
        """The content of a shard's block index, wanted for a block.

        Raises:
            FileNotFoundError: there is none.
        """

    @abstractmethod
    def sizes(self, shards: IntArray) -> IntArray:
        """The bytes of each shard's file [n]; -1 where there is none."""

    def have_index(self, shards: IntArray) -> npt.NDArray[np.bool_]:
        """Where the block index is there [n], as far as that can be seen at once: where a look is a request to a server
        it is the first read of a shard that asks for it."""
        return np.ones(len(shards), np.bool_)

    @abstractmethod
    def abandon(self) -> None:
        """Nobody waits any more for what is being fetched; what does wait gets an error. Threads may call it."""

    def after_fork(self) -> None:
        """Called in a forked child: the parent's threads are gone, with the locks that they held."""
        self._checksums_lock = threading.Lock()

    def check_files(self, rank: int, world: int, on_damage: OnDamage) -> list[str]:
        """Look for each ``world``-th shard, from row ``rank`` on; returns in words what is not as the manifest says.

        Raises:
            DataError: something is not, and ``on_damage`` is ``"stop"``; names the first ones.
        """
        mine = np.arange(rank, len(self.shards), world)
        sizes = self.sizes(mine)
        wrong = sizes != self.shards.bytes[mine]
        bare = ~wrong & ~self.have_index(mine)
        amiss = np.flatnonzero(wrong | bare)
        if on_damage == "hole" or not len(amiss):
            return [
                self._amiss(row, size) for row, size in zip(mine[amiss].tolist(), sizes[amiss].tolist(), strict=True)
            ]
        first = amiss[:_NAMED]
        listed = [self._amiss(row, size) for row, size in zip(mine[first].tolist(), sizes[first].tolist(), strict=True)]
        if (more := len(amiss) - len(listed)) > 0:
            missing = int((sizes < 0).sum())
            kinds = f"{missing} missing, {wrong.sum() - missing} of another size, {bare.sum()} without block index"
            listed.append(f"and {more} more (in all {kinds})")
        advice = f"{self._advice} {HOLES_ADVICE}" if wrong.any() else HOLES_ADVICE
        raise DataError(f"{'; '.join(listed)}. {advice}")

    def _amiss(self, shard: int, size: int) -> str:
        """What is not right with a shard whose file has ``size`` bytes (-1: there is none)."""
        if size < 0:
            return (
                f"shard {self.where(shard)} is missing: the manifest lists it with {self.shards.tokens[shard]} tokens"
            )
        if size != self.shards.bytes[shard]:
            return f"shard {self.where(shard)} has {size} bytes where the manifest says {self.shards.bytes[shard]}"
        advice = f"`pretrain-data verify --rebuild-sidecars {self.root}` writes it again from the shard"
        return f"the block index {self.where(shard, 'idx')} is missing ({advice})"

    def where(self, shard: int, suffix: str = "tar") -> str:
        """The path or address of a shard, or of what lies beside it under another suffix."""
        return f"{self.root}/{shard_file(self.shards.names[shard], suffix)}"

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

    def _index_advice(self, shard: int) -> str:
        """What to do about a block index that is missing or another one."""
        return f"Run `pretrain-data verify --rebuild-sidecars {self.root}` to write it again from the shard."

    def close(self) -> None:
        """Close the open files; a later read opens them again."""
        self._checksums.clear()

    def _read_checksums(self, shard: int, block: int) -> Checksums:
        path, advice = self.where(shard, "idx"), self._index_advice(shard)
        where = (self.shards.names[shard], block, self.layout.data_offset(block))
        try:
            content = self.read_index(shard, block)
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
                wanted = f"wanted for block {block} at byte offset {self.layout.data_offset(block)}"
                what = f"which the manifest lists with {self.shards.tokens[shard]} tokens, is missing ({wanted})"
                raise self.damage(shard, block, "missing", what) from error
            self._files.put(shard, file)
        return file

    def again(self, shard: int, span: tuple[int, int] | None) -> bool:
        return False

    def abandon(self) -> None:
        """Nothing is fetched."""

    def read_index(self, shard: int, block: int) -> bytes:
        return Path(self.where(shard, "idx")).read_bytes()

    def sizes(self, shards: IntArray) -> IntArray:
        return np.array(self._look(shards, "tar", _size), np.int64)

    def have_index(self, shards: IntArray) -> npt.NDArray[np.bool_]:
        return np.array(self._look(shards, "idx", _is_there), np.bool_)

    def _look(self, shards: IntArray, suffix: str, look: Callable[[str], Found]) -> list[Found]:
        names, folder = self.shards.names, f"{self.root}/{SHARD_FOLDER}"

        def at(part: IntArray) -> list[Found]:
            return [look(f"{folder}/{names[row]}.{suffix}") for row in part.tolist()]

        # threads for network file systems, where a look costs a round trip
        with ThreadPoolExecutor(_LOOKING) as pool:
            return list(itertools.chain.from_iterable(pool.map(at, np.array_split(shards, _LOOKING))))

    def close(self) -> None:
        super().close()
        self._files.clear()


def shard_file(shard: str, suffix: str) -> str:
    """The name of a file of a shard in its data set."""
    return f"{SHARD_FOLDER}/{shard}.{suffix}"


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return -1


def _is_there(path: str) -> bool:
    return os.access(path, os.F_OK)  # half the time of a `stat`
