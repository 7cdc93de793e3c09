"""Sequences of a data set, each one ``pread`` at an offset found by arithmetic, each block checked on first touch."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import crc32c
import numpy as np
import numpy.typing as npt

from .errors import DataError, UserError
from .files import sha256_file
from .layout import index_path, read_index, shard_path
from .manifest import Manifest, Shard, read_manifest
from .permutation import IntArray

_OPEN_SHARDS = 256


class Place(NamedTuple):
    """Where a sequence lies: the shard, the block in it, and its first token counted from the shard's start."""

    shard: str
    block: int
    token: int


class TokenSource:
    """The sequences of one domain and split of a data set, by index.

    Every shard is cut into ``ceil(valid tokens / seq_len)`` sequences, shard after shard in name order, so that no
    token is dropped: the last sequence of a shard is filled up with EOS. Memory does not grow with the number of
    sequences. Threads may share a source.

    Args:
        folder: the data set.
        domain: one of its domains; ``None`` for all.
        split: ``"train"`` or ``"heldout"``.
        seq_len: tokens per sequence; must divide the data set's ``block_tokens``, so that none straddles two blocks.

    Raises:
        UserError: no such data set, domain or split, or ``seq_len`` does not divide a block.
        DataError: a shard is missing or has another size than the manifest says.
    """

    def __init__(self, folder: Path, domain: str | None, split: str, seq_len: int) -> None:
        self.folder, self.domain, self.split, self.seq_len = folder, domain, split, seq_len
        self.manifest: Manifest = read_manifest(folder)
        try:
            self.shards = self.manifest.select(domain, split)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
        self._layout = self.manifest.layout
        _check_divides(folder, seq_len, self._layout.block_tokens)
        for shard in self.shards:
            _check_file(shard_path(folder, shard.name), shard)
        tokens = np.array([shard.tokens for shard in self.shards], np.int64)
        self._ends = np.cumsum(-(-tokens // seq_len))
        self._first_blocks = np.cumsum([0, *(shard.blocks for shard in self.shards)], dtype=np.int64)
        # one bit a block: 19 MB for the 10^13 tokens of 10^5 shards
        self._checked = np.zeros((int(self._first_blocks[-1]) + 7) // 8, np.uint8)
        self._files: OrderedDict[int, _ShardFile] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def sequences(self) -> int:
        """The number of sequences."""
        return int(self._ends[-1])

    @property
    def tokens(self) -> int:
        """The number of valid tokens, EOS filling left out."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def eos_id(self) -> int:
        """The token that ends every document."""
        return self.manifest.eos_id

    def read(self, indices: npt.ArrayLike) -> npt.NDArray[np.unsignedinteger[Any]]:
        """The tokens of the sequences ``indices`` [n], in that order, each with the token that follows it.

        Returns:
            [n, seq_len + 1], in the data set's dtype (uint16 or uint32); a new array at every call.

        Raises:
            DataError: a block's CRC32C is not the recorded one, a shard ends early, or its index is damaged.
            IndexError: an index lies outside ``range(sequences)``.
        """
        wanted = np.asarray(indices, np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < self.sequences):
            raise IndexError(f"sequences {wanted.min()} to {wanted.max()} of a source that has {self.sequences}")
        tokens = np.empty((len(wanted), self.seq_len + 1), self._layout.token_dtype)
        content = tokens.view(np.uint8).reshape(-1).data
        row_bytes = tokens.strides[0]
        by_offset = np.argsort(wanted, kind="stable")
        shards, blocks, starts = self._locate(wanted[by_offset])
        with self._lock:
            for row, shard, block, start in zip(
                by_offset.tolist(), shards.tolist(), blocks.tolist(), starts.tolist(), strict=True
            ):
                self._read_row(content[row * row_bytes : (row + 1) * row_bytes], shard, block, start)
        return tokens

    def place(self, index: int) -> Place:
        """Where sequence ``index`` lies."""
        shards, blocks, starts = self._locate(np.array([index]))
        return Place(
            self.shards[shards[0]].name, int(blocks[0]), int(blocks[0] * self._layout.block_tokens + starts[0])
        )

    def close(self) -> None:
        """Close the open shards; a later read opens them again."""
        with self._lock:
            while self._files:
                self._files.popitem()[1].handle.close()

    def __enter__(self) -> TokenSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _locate(self, indices: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """The number of the shard, the block in it and the first token in the block of each index."""
        shards = np.searchsorted(self._ends, indices, side="right")
        before = np.concatenate([[0], self._ends])[shards]
        blocks, places = np.divmod(indices - before, self._layout.block_tokens // self.seq_len)
        return shards, blocks, places * self.seq_len

    def _read_row(self, row: memoryview, shard: int, block: int, start: int) -> None:
        file = self._file(shard)
        offset, skipped = self._layout.data_offset(block), start * self._layout.token_bytes
        bit = int(self._first_blocks[shard]) + block
        if self._checked[bit >> 3] >> (bit & 7) & 1:
            file.read(row, offset + skipped, block)
            return
        content = memoryview(bytearray(self._layout.block_bytes))
        file.read(content, offset, block)
        file.check(content, offset, block)
        self._checked[bit >> 3] |= 1 << (bit & 7)
        row[:] = content[skipped : skipped + len(row)]

    def _file(self, shard: int) -> _ShardFile:
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            if len(self._files) >= _OPEN_SHARDS:
                self._files.popitem(last=False)[1].handle.close()
            self._files[shard] = _ShardFile(self.folder, self.shards[shard])
        return self._files[shard]


class _ShardFile:
    """One open shard and, once a block must be checked, its recorded CRCs."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.folder, self.shard = folder, shard
        self.path = shard_path(folder, shard.name)
        try:
            self.handle = FileIO(self.path)
        except FileNotFoundError as error:
            raise _missing(self.path, shard) from error
        self._crcs: npt.NDArray[np.uint32] | None = None

    def read(self, into: memoryview, offset: int, block: int) -> None:
        """Fill ``into`` from byte ``offset`` on.

        Raises:
            DataError: the file ends first.
            OSError: the disk failed; names the shard.
        """
        done = 0
        while done < len(into):
            try:
                got = os.preadv(self.handle.fileno(), [into[done:]], offset + done)
            except OSError as error:
                raise OSError(
                    error.errno, f"{error.strerror} (block {block}, byte {offset})", str(self.path)
                ) from error
            if got == 0:
                raise DataError(
                    f"shard {self.path} ends at byte {offset + done}, inside block {block} (bytes {offset} to "
                    f"{offset + len(into)}); it was whole when the run began. {_advice(self.folder)}"
                )
            done += got

    def check(self, content: memoryview, offset: int, block: int) -> None:
        """Compare the CRC32C of a whole block with the recorded one.

        Raises:
            DataError: they differ, or the index that records it is not the manifest's.
        """
        if self._crcs is None:
            self._crcs = self._read_crcs()
        expected, found = int(self._crcs[block]), crc32c.crc32c(content)
        if found != expected:
            raise DataError(
                f"shard {self.path}, block {block} at byte offset {offset} is damaged: its CRC32C is {found:#010x}, "
                f"{expected:#010x} was recorded when it was written. {_advice(self.folder)}"
            )

    def _read_crcs(self) -> npt.NDArray[np.uint32]:
        path = index_path(self.folder, self.shard.name)
        entries = read_index(path)
        if sha256_file(path) != self.shard.idx_sha256:
            raise DataError(
                f"the block index {path} is not the one the manifest names (its SHA-256 differs). "
                f"Run `pretrain-data verify --rebuild-sidecars {self.folder}` to write it again from the shard."
            )
        crcs: npt.NDArray[np.uint32] = entries["crc32c"].astype(np.uint32)
        return crcs


def _check_divides(folder: Path, seq_len: int, block_tokens: int) -> None:
    if 1 <= seq_len <= block_tokens and block_tokens % seq_len == 0:
        return
    divisors = [length for length in range(1, block_tokens + 1) if block_tokens % length == 0]
    below = [length for length in divisors if length < seq_len][-1:]
    above = [length for length in divisors if length > seq_len][:1]
    raise UserError(
        f"seq_len {seq_len} does not divide the blocks of {block_tokens} tokens of the data set {folder}. Use "
        f"{' or '.join(map(str, below + above))}, or prepare the data set with other block_tokens."
    )


def _check_file(path: Path, shard: Shard) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise _missing(path, shard) from error
    if size != shard.bytes:
        raise DataError(
            f"shard {path} has {size} bytes where the manifest says {shard.bytes}. {_advice(path.parent.parent)}"
        )


def _missing(path: Path, shard: Shard) -> DataError:
    return DataError(
        f"shard {path} is missing: the manifest lists it with {shard.tokens} tokens of {shard.domain}/{shard.split}. "
        f"{_advice(path.parent.parent)}"
    )


def _advice(folder: Path) -> str:
    return f"Run `pretrain-data verify {folder}` to see all damage, then restore the shard from a copy."
