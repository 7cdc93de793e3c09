"""Shards on remote storage: whole, or the windows that the order asks for, fetched ahead into the node's cache."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from typing import Any, BinaryIO, NamedTuple

import crc32c
import numpy as np

from .damage import HOLES_ADVICE, DamagedBlockError, OnDamage, Reason
from .errors import DataError
from .layout import BlockLayout
from .open_files import OpenFile, RecentlyUsed, open_files_limit
from .permutation import IntArray
from .shard_files import ShardFiles, shard_file
from .shard_table import ShardTable
from .storage import AbandonedError, AccessError, MissingFileError, NodeCache, StorageError, Store
from .storage.errors import join


class Piece(NamedTuple):
    """The blocks ``[first, stop)`` of a shard, by the shard's row: what is fetched at once."""

    shard: int
    first: int
    stop: int


class RemoteShards(ShardFiles):
    """Shards of a store, read from the node's cache.

    A whole shard is checked by its SHA-256 before it is trusted, a window by the CRC32C of each of its blocks. Under
    ``"hole"`` what stays damaged when it is fetched again is kept as it was found: each block is checked once more when
    it is read, so that only the damaged ones are lost.

    Args:
        store: holds the data set; its settings say where the node's cache is.
        shards: rows of the source's shards.
        layout: the arithmetic of the shards.
        on_damage: what becomes of damage that stays.
    """

    def __init__(self, store: Store, shards: ShardTable, layout: BlockLayout, on_damage: OnDamage) -> None:
        super().__init__(store.root, shards, layout)
        self._store, self._on_damage = store, on_damage
        self._cache = NodeCache(store.settings.cache)
        self._files: RecentlyUsed[Piece, OpenFile] = RecentlyUsed(open_files_limit(), OpenFile.close)
        self._coming: dict[Piece, Future[OpenFile]] = {}
        self._lost: dict[Piece, StorageError | DamagedBlockError] = {}
        self._fetched_again: set[Piece] = set()
        self._as_found: set[Piece] = set()
        self._pool: ThreadPoolExecutor | None = None
        self._counting = threading.Lock()
        self.fetched = 0
        """How many pieces this process has brought into the cache."""

    def open(self, shard: int, block: int, span: tuple[int, int] | None) -> OpenFile:
        piece = self.piece(shard, span)
        if (file := self._files.get(piece)) is not None:
            return file
        try:
            if piece in self._lost:
                raise self._lost[piece]
            coming = self._coming.pop(piece, None)
            if coming is None:
                self._settle()
            return self._files.put(piece, coming.result() if coming else self._obtain(piece))
        except AbandonedError:
            raise  # no damage: a later read may ask again
        except StorageError as error:
            # that a command fails is all that it can say about a file that is not there
            if _says_nothing(error) and (self._store.ranges or self._on_damage == "stop"):
                raise self._with_a_way_out(error, shard, block, self._advice) from error
            self._lost[piece] = error
            reason: Reason = "missing" if isinstance(error, MissingFileError) or error.transient else "short"
            where = f"block {block} at byte offset {self.layout.data_offset(block)}"
            raise self.damage(shard, block, reason, f"{where}, can't be read: {error.reason}") from error
        except DamagedBlockError as error:
            if piece in self._fetched_again:
                self._lost[piece] = error
            raise

    def again(self, shard: int, span: tuple[int, int] | None) -> bool:
        piece = self.piece(shard, span)
        if piece in self._fetched_again or piece in self._lost:
            return False
        self._fetched_again.add(piece)
        self._files.remove(piece)
        self._cache.discard(self._key(piece))
        return True

    def ahead(self, shard: int, span: tuple[int, int] | None) -> None:
        """Begin to fetch what will be opened soon."""
        piece = self.piece(shard, span)
        if piece in self._coming or piece in self._lost or piece in self._files:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._store.settings.remote.parallel, "shard-fetch")
        self._coming[piece] = self._pool.submit(self._obtain, piece)

    @property
    def busy(self) -> bool:
        """Whether enough is coming to keep all connections at work."""
        return len(self._coming) >= 2 * self._store.settings.remote.parallel

    def _settle(self) -> None:
        """What has come and was not opened goes to the open files: its blocks were found damaged before, so nobody asks
        for it, and it would count as coming for ever. Called when something was not fetched ahead, as is then seen."""
        for piece in [piece for piece, coming in self._coming.items() if coming.done()]:
            coming = self._coming.pop(piece)
            if coming.exception() is None:
                self._files.put(piece, coming.result())

    def piece(self, shard: int, span: tuple[int, int] | None) -> Piece:
        """What must be fetched for these blocks: the whole shard where there are no byte ranges."""
        if span is None or not self._store.ranges:
            return Piece(shard, 0, int(self.shards.blocks[shard]))
        return Piece(shard, *span)

    def sizes(self, shards: IntArray) -> IntArray:
        if not self._store.ranges:
            return self.shards.bytes[shards]  # a command's output has no size but that of all of it
        with ThreadPoolExecutor(self._store.settings.remote.parallel) as pool:
            try:
                return np.fromiter(pool.map(self._size, shards.tolist()), np.int64, len(shards))
            except BaseException:
                self.abandon()  # the pool waits for what its threads ask for
                raise

    def abandon(self) -> None:
        self._store.abandon()

    def read_index(self, shard: int, block: int) -> bytes:
        expected = self.shards.idx_sha256[shard].tobytes()

        def fill(to: BinaryIO) -> None:
            content = self._store.read(shard_file(self.shards.names[shard], "idx"))
            if hashlib.sha256(content).digest() != expected:
                raise _WrongIndexError
            to.write(content)

        def cached() -> bytes:
            with self._cache.open(expected.hex(), fill) as handle:
                content: bytes = handle.readall()
                return content

        try:
            if hashlib.sha256(content := cached()).digest() != expected:
                self._cache.discard(expected.hex())  # it went bad on this node
                content = cached()
            return content
        except MissingFileError as error:
            raise FileNotFoundError(str(error)) from error
        except _WrongIndexError:
            return b""
        except StorageError as error:
            command_under_hole = not self._store.ranges and self._on_damage == "hole"
            if isinstance(error, MissingFileError) or command_under_hole:
                raise FileNotFoundError(str(error)) from error
            raise self._with_a_way_out(error, shard, block, self._index_advice(shard)) from error

    def _with_a_way_out(self, error: StorageError, shard: int, block: int, advice: str) -> StorageError:
        """``error``; where it is of a command, with ``advice`` for a file that is not there: no command can say so."""
        if self._store.ranges:
            return error
        reason = f"{error.reason} (wanted for block {block} at byte offset {self.layout.data_offset(block)})"
        told = f"{error.advice} If the file is not there: {advice} {HOLES_ADVICE}"
        return StorageError(error.root, error.name, error.start, reason, told, transient=error.transient)

    def where(self, shard: int, suffix: str = "tar") -> str:
        return join(self.root, shard_file(self.shards.names[shard], suffix))

    @property
    def _advice(self) -> str:
        look = f"whether {self.root} answers" if self._store.ranges else f"what the command {self.root} does"
        return f"Look {look}, and restore there what is wrong from a copy."

    def _index_advice(self, shard: int) -> str:
        name = shard_file(self.shards.names[shard], "idx")
        return (
            f"Write {name} again with `pretrain-data verify --rebuild-sidecars FOLDER`, where the data set is a folder "
            f"or in a copy of it, and put it where {self.root} finds it."
        )

    def after_fork(self) -> None:
        super().after_fork()
        self._pool, self._coming, self._counting = None, {}, threading.Lock()

    def close(self) -> None:
        super().close()
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
        for coming in self._coming.values():
            coming.add_done_callback(_close_result)
        self._coming.clear()
        self._files.clear()

    def _size(self, shard: int) -> int:
        try:
            return self._store.size(shard_file(self.shards.names[shard], "tar"))
        except MissingFileError:
            return -1

    def _obtain(self, piece: Piece) -> OpenFile:
        """The piece from the cache, fetched if it is not there."""
        key, whole = self._key(piece), self._is_whole(piece)
        start = 0 if whole else self.layout.data_offset(piece.first)
        if piece in self._as_found:
            return OpenFile(self._open_as_found(piece), start, self.where(piece.shard), as_found=True)
        try:
            fill = self._fill_whole if whole else self._fill_window
            handle = self._cache.open(key, lambda to: fill(piece, to), self._size_of(piece))
        except MissingFileError:
            raise
        except (DataError, StorageError) as error:
            if self._on_damage == "stop" or (isinstance(error, StorageError) and _says_nothing(error)):
                raise
            if piece not in self._fetched_again:
                # what an earlier run found may be mended in part by now
                self._cache.discard(self._key_as_found(piece))
            with self._counting:
                self._fetched_again.add(piece)
                self._as_found.add(piece)
            return OpenFile(self._open_as_found(piece), start, self.where(piece.shard), as_found=True)
        return OpenFile(handle, start, self.where(piece.shard))

    def _open_as_found(self, piece: Piece) -> FileIO:
        return self._cache.open(self._key_as_found(piece), lambda to: self._fill_as_found(piece, to))

    def _fill_whole(self, piece: Piece, to: BinaryIO) -> None:
        self._count()
        shard, name = piece.shard, shard_file(self.shards.names[piece.shard], "tar")
        expected = self.shards.sha256[shard].tobytes()
        for _ in range(2):
            to.seek(0)
            to.truncate()
            hashing = _Hashing(to)
            self._store.fetch(name, hashing, int(self.shards.bytes[shard]))  # type: ignore[arg-type]  # only appends
            if hashing.sha256.digest() == expected:
                return
        with self._counting:
            self._fetched_again.add(piece)
        raise self._damage_in(shard, to)

    def _damage_in(self, shard: int, whole: BinaryIO) -> DamagedBlockError:
        """What is wrong first with a ``whole`` shard that has its size and not its SHA-256."""
        layout, name = self.layout, self.shards.names[shard]
        expected = self.checksums(shard, 0)
        outside: tuple[int, int] | None = None
        whole.seek(0)
        for block in range(len(expected)):
            head = layout.member_head(name, block)
            member = whole.read(layout.member_stride)
            data = member[len(head) : len(head) + layout.block_bytes]
            if (found := crc32c.crc32c(data)) != expected[block]:
                return self.wrong_checksum(shard, block, found, int(expected[block]))
            written = head + data + layout.member_tail()
            if outside is None and member != written:
                at = next(at for at, (one, other) in enumerate(zip(member, written, strict=True)) if one != other)
                outside = block, block * layout.member_stride + at
        block, offset = outside or (len(expected) - 1, len(expected) * layout.member_stride)
        where = f"block {block}: a tar header, padding or the end of the archive, from byte offset {offset} on"
        told = f"{where}, is not as written, though all tokens are: the SHA-256 is not the one that the manifest says"
        return self.damage(shard, block, "checksum", told)

    def _fill_window(self, piece: Piece, to: BinaryIO) -> None:
        self._count()
        layout, name = self.layout, shard_file(self.shards.names[piece.shard], "tar")
        start, stop = self._bytes_of(piece)
        content = bytearray(self._store.read_range(name, start, stop))
        expected = self.checksums(piece.shard, piece.first)
        for block in range(piece.first, piece.stop):
            first = layout.data_offset(block)
            here = slice(first - start, first - start + layout.block_bytes)
            if crc32c.crc32c(content[here]) == expected[block]:
                continue
            content[here] = self._store.read_range(name, first, first + layout.block_bytes)
            if (found := crc32c.crc32c(content[here])) != expected[block]:
                raise self.wrong_checksum(piece.shard, block, found, int(expected[block]))
        to.write(content)

    def _fill_as_found(self, piece: Piece, to: BinaryIO) -> None:
        """Whatever there is, up to where it ends."""
        name = shard_file(self.shards.names[piece.shard], "tar")
        if self._is_whole(piece):
            self._store.fetch(name, to)
            return
        for block in range(piece.first, piece.stop):
            # also what lies between the blocks, so that the bytes stand as they do in the shard
            start, stop = self._bytes_of(Piece(piece.shard, block, block + 1))
            if block > piece.first:
                to.write(bytes(self.layout.member_stride - self.layout.block_bytes))
            try:
                to.write(self._store.read_range(name, start, stop))
            except StorageError as error:
                if _says_nothing(error):
                    raise
                return

    def _bytes_of(self, piece: Piece) -> tuple[int, int]:
        """From the first token of the first block to the last token of the last."""
        return (
            self.layout.data_offset(piece.first),
            self.layout.data_offset(piece.stop - 1) + self.layout.block_bytes,
        )

    def _size_of(self, piece: Piece) -> int:
        start, stop = self._bytes_of(piece)
        return int(self.shards.bytes[piece.shard]) if self._is_whole(piece) else stop - start

    def _is_whole(self, piece: Piece) -> bool:
        return piece.first == 0 and piece.stop == int(self.shards.blocks[piece.shard])

    def _key(self, piece: Piece) -> str:
        """Named by content, so that neither the place of a data set nor a token in its address matters."""
        name = self.shards.sha256[piece.shard].tobytes().hex()
        return name if self._is_whole(piece) else f"{name}-{piece.first:06d}-{piece.stop:06d}"

    def _key_as_found(self, piece: Piece) -> str:
        """What is damaged is not what its name says: another copy of the data set has other damage, or none."""
        return f"{self._key(piece)}-{hashlib.sha256(self.root.encode()).hexdigest()[:16]}-as-found"

    def _count(self) -> None:
        with self._counting:
            self.fetched += 1


class _WrongIndexError(DataError):
    """The index of a shard is not the manifest's."""


class _Hashing:
    """Hashes what is written through it."""

    def __init__(self, to: BinaryIO) -> None:
        self._to, self.sha256 = to, hashlib.sha256()

    def write(self, content: Any) -> int:
        self.sha256.update(content)
        return self._to.write(content)


def _says_nothing(error: StorageError) -> bool:
    """Whether the storage failed without a word about the file: what is there may be intact."""
    return error.transient or isinstance(error, AccessError)


def _close_result(coming: Future[OpenFile]) -> None:
    if not coming.cancelled() and coming.exception() is None:
        coming.result().close()
