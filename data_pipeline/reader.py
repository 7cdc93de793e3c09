"""Sequences of a data set, each one ``pread`` at an offset found by arithmetic, each block checked on first touch."""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .block_memory import KeptBlocks
from .checked_blocks import CheckedBlocks, Damaged, Wanted
from .damage import OnDamage
from .errors import UserError
from .manifest import Manifest, load_manifest, read_manifest
from .permutation import IntArray
from .rows import Rows, Tokens
from .shard_files import LocalShards
from .shard_table import ShardTable
from .storage import StorageSettings, open_store

if TYPE_CHECKING:
    from .remote_shards import RemoteShards


_LOOK_SECONDS = 0.1


class Place(NamedTuple):
    """Where a sequence lies: the shard, the block in it, and its first token counted from the shard's start."""

    shard: str
    block: int
    token: int


class TokenSource:
    """The sequences of one domain and split of a data set, by index.

    Every shard is cut into ``ceil(tokens / seq_len)`` sequences, shard after shard in name order, so that no token is
    dropped: the last sequence of a shard is filled up with EOS. Memory does not grow with the number of sequences.
    Threads may share a source, processes may inherit or pickle it.

    Args:
        root: the data set: a folder, or an address that :func:`~data_pipeline.storage.open_store` knows.
        domain: one of its domains; ``None`` for all.
        split: ``"train"`` or ``"heldout"``.
        seq_len: tokens per sequence; must divide the data set's ``block_tokens``, so that none straddles two blocks.
        manifest: that of ``root`` where it has been read already.
        storage: how remote storage is read and where the node keeps what was fetched.
        share: (rank, world size): this process checks that each world-size-th shard is there and has its size, and on a
            local disk that its block index is there; all ranks together check all.
        on_damage: ``"hole"`` lets shards and indexes be missing or cut off; :meth:`read_or_damage` then tells of it.

    Raises:
        UserError: no such data set, domain or split, or ``seq_len`` does not divide a block.
        DataError: under ``"stop"``: shards of this share are missing, have another size than the manifest says, or
            have no block index.
    """

    def __init__(
        self,
        root: str | Path,
        domain: str | None,
        split: str,
        seq_len: int,
        *,
        manifest: Manifest | None = None,
        storage: StorageSettings | None = None,
        share: tuple[int, int] = (0, 1),
        on_damage: OnDamage = "stop",
    ) -> None:
        self._arguments: dict[str, Any] = {
            "root": root, "domain": domain, "split": split, "seq_len": seq_len, "storage": storage, "share": share,
            "on_damage": on_damage,
        }  # fmt: skip
        self.root, self.domain, self.split, self.seq_len, self.on_damage = str(root), domain, split, seq_len, on_damage
        storage = storage or StorageSettings()
        store = open_store(str(root), storage)
        self.remote = store.local is None
        """Whether what is read must be fetched first."""
        if manifest is None:
            manifest = read_manifest(store.local) if store.local else load_manifest(store.read, store.root)
        self.manifest = manifest
        try:
            self.shards: ShardTable = self.manifest.select(domain, split)
        except UserError as error:
            raise UserError(f"{root}: {error}") from error
        self._layout = self.manifest.layout
        _check_divides(self.root, seq_len, self._layout.block_tokens)
        self._files: LocalShards | RemoteShards
        if store.local:
            self._files = LocalShards(store.local, self.shards, self._layout)
        else:
            from .remote_shards import RemoteShards

            self._files = RemoteShards(store, self.shards, self._layout, on_damage)
        self.unusable = self._files.check_files(*share, on_damage)
        """What shards of this process's share are not as the manifest says, in words; some only under ``"hole"``."""
        sequences = -(-self.shards.tokens // seq_len)
        self._ends = np.cumsum(sequences)
        self._starts = self._ends - sequences
        self._first_blocks = np.cumsum(np.concatenate([[0], self.shards.blocks]), dtype=np.int64)
        self._per_block = self._layout.block_tokens // seq_len
        self._blocks = CheckedBlocks(self._files, self._layout, int(self._first_blocks[-1]), seq_len)
        self._lock = threading.Lock()
        _ALIVE.add(self)

    @property
    def sequences(self) -> int:
        """The number of sequences."""
        return int(self._ends[-1])

    @property
    def tokens(self) -> int:
        """The number of tokens, the filling of the last blocks left out."""
        return int(self.shards.tokens.sum())

    def unreadable_shards(self, share: tuple[int, int] | None = None) -> IntArray:
        """Rows of the shards without file or block index, in a share (rank, ranks) of them, by default this process's.

        None where the storage is remote: each of its shards would have to be asked for.
        """
        rank, world = share or self._arguments["share"]
        rows = np.arange(rank, len(self.shards), world)
        return rows[:0] if self.remote else rows[(self._files.sizes(rows) < 0) | ~self._files.have_index(rows)]

    def sequences_of(self, shard: int) -> IntArray:
        """The sequences that lie in a shard, by its row in ``shards``; int64 [k]."""
        return np.arange(self._starts[shard], self._ends[shard])

    def check_every_file(self) -> list[str]:
        """As :attr:`unusable`, of all shards, where they are local.

        Raises:
            DataError: some are not as the manifest says, and ``on_damage`` is ``stop``.
        """
        return self.unusable if self.remote else self._files.check_files(0, 1, self.on_damage)

    @property
    def reading(self) -> tuple[int, int] | None:
        """(row of the shard, block) that a read is at; a new tuple for each, for a watchdog to look at."""
        return self._blocks.reading

    @property
    def eos_id(self) -> int:
        """The token that ends every document."""
        return self.manifest.eos_id

    def read(self, indices: npt.ArrayLike, windows: IntArray | None = None) -> Tokens:
        """The tokens of the sequences ``indices`` [n], in that order, each with the token that follows it.

        Args:
            indices: of the sequences.
            windows: as in :meth:`read_or_damage`.

        Returns:
            [n, seq_len + 1], in the data set's dtype (uint16 or uint32); a new array at every call.

        Raises:
            DataError: a block's CRC32C is not the recorded one, a shard ends early, or its index is damaged.
            IndexError: an index lies outside ``range(sequences)``.
        """
        rows, damage = self.read_or_damage(indices, windows)
        for error in damage.values():
            raise error
        return rows

    def read_or_damage(self, indices: npt.ArrayLike, windows: IntArray | None = None) -> tuple[Tokens, Damaged]:
        """As :meth:`read`, but with what is wrong, by row, in place of an exception; such rows are EOS.

        Args:
            indices: of the sequences [n].
            windows: [2, n]: the first sequence, and the one after the last, of what to fetch together with each
                sequence where the storage is remote; None: whole shards.

        Raises:
            IndexError: an index lies outside ``range(sequences)``.
            OSError: the disk.
        """
        found, damage = self.find_or_damage(indices, windows)
        rows = found.copy()
        for row in damage:
            rows[row] = self.eos_id
        return rows, damage

    def find_or_damage(
        self, indices: npt.ArrayLike, windows: IntArray | None = None, kept: KeptBlocks | None = None
    ) -> tuple[Rows, Damaged]:
        """As :meth:`read_or_damage`, but nothing is copied out of ``kept``; what stands in damaged rows is undefined.

        Args:
            indices: of the sequences [n], one or more.
            windows: as above.
            kept: this source's part of a :class:`~data_pipeline.block_memory.BlockMemory`: what is there is not read
                again, and blocks that are read for the first time go there. The rows are good until that is released.
        """
        wanted = np.asarray(indices, np.int64)
        if len(wanted) and int(wanted.view(np.uint64).max()) >= self.sequences:  # as would be a negative one
            raise IndexError(f"sequences {wanted.min()} to {wanted.max()} of a source that has {self.sequences}")
        shards, blocks, within = self._locate(wanted)
        spans = None if windows is None else self._spans(shards, windows)
        with self._lock:
            return self._blocks.rows(Wanted(shards, blocks, self._first_blocks[shards] + blocks, within, spans), kept)

    def place(self, index: int) -> Place:
        """Where sequence ``index`` lies."""
        shards, blocks, within = self._locate(np.array([index]))
        token = int(blocks[0]) * self._layout.block_tokens + int(within[0]) * self.seq_len
        return Place(self.shards.names[shards[0]], int(blocks[0]), token)

    def where(self, shard: int) -> str:
        """The path or address of a shard, by its row in ``shards``."""
        return self._files.where(shard)

    def fetch_ahead(self, indices: IntArray, windows: IntArray) -> bool:
        """Begin to fetch what the sequences ``indices`` [n] will need, in their order, where the storage is remote.

        Args:
            indices: of the sequences.
            windows: [2, n], as in :meth:`read_or_damage`.

        Returns:
            whether it was begun; False where enough is coming already.
        """
        if isinstance(self._files, LocalShards):
            return True
        with self._lock:
            if self._files.busy:
                return False
            shards = self._locate(indices)[0]
            pieces, first = np.unique(np.stack([shards, *self._spans(shards, windows)]), axis=1, return_index=True)
            for shard, begin, stop in pieces[:, np.argsort(first)].T.tolist():
                self._files.ahead(shard, (begin, stop))
        return True

    @property
    def fetched(self) -> int:
        """How many windows and whole shards this process has fetched into the node's cache."""
        return 0 if isinstance(self._files, LocalShards) else self._files.fetched

    def close(self) -> None:
        """Close the open shards, and give up what is being fetched; a later read opens them again."""
        self._files.abandon()
        while not self._lock.acquire(timeout=_LOOK_SECONDS):
            self._files.abandon()  # a read that goes from one file to the next holds the lock
        try:
            self._files.close()
        finally:
            self._lock.release()

    def __enter__(self) -> TokenSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _open, (self._arguments,)

    def _locate(self, indices: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """The row of the shard, the block in it and the place in the block of each index."""
        shards = np.searchsorted(self._ends, indices, side="right")
        blocks, within = np.divmod(indices - self._starts[shards], self._per_block)
        return shards, blocks, within

    def _spans(self, shards: IntArray, windows: IntArray) -> IntArray:
        """The blocks ``[first, stop)`` of each shard [n] that hold the sequences of its window [2, n]; int64 [2, n]."""
        first, stop = windows - self._starts[shards]
        return np.stack(
            [
                np.maximum(first // self._per_block, 0),
                np.minimum(-(-stop // self._per_block), self.shards.blocks[shards]),
            ]
        )

    def _after_fork(self) -> None:
        # another thread of the parent may have held the lock at the moment of the fork
        self._lock = threading.Lock()
        self._files.after_fork()


_ALIVE: weakref.WeakSet[TokenSource] = weakref.WeakSet()


def _renew_all() -> None:
    for source in list(_ALIVE):
        source._after_fork()


os.register_at_fork(after_in_child=_renew_all)


def _open(arguments: dict[str, Any]) -> TokenSource:
    return TokenSource(**arguments)


def _check_divides(root: str, seq_len: int, block_tokens: int) -> None:
    if 1 <= seq_len <= block_tokens and block_tokens % seq_len == 0:
        return
    divisors = [length for length in range(1, block_tokens + 1) if block_tokens % length == 0]
    below = [length for length in divisors if length < seq_len][-1:]
    above = [length for length in divisors if length > seq_len][:1]
    raise UserError(
        f"seq_len {seq_len} does not divide the blocks of {block_tokens} tokens of the data set {root}. Use "
        f"{' or '.join(map(str, below + above))}, or prepare the data set with other block_tokens."
    )
