"""Where things lie in a data set folder, and where a token lies in a shard.

A shard is a plain USTAR archive. Each member is one block of ``block_tokens + 1`` tokens as a version 1.0 ``.npy``
file; the extra token is the look-ahead: the first token of the next block, so that every position of a block has a
label. Headers are written here byte by byte: they must not change with the version of Python or numpy, because the
hash of a shard is part of the data set's identity, and because a constant member stride makes a token's offset plain
arithmetic.
"""

from __future__ import annotations

import math
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import DataError

MANIFEST_FILE = "manifest.json"
SHARD_TABLE_FILE = "shards.parquet"
TOKENIZER_FILE = "tokenizer.model"
SHARD_FOLDER = "shards"
REJECTED_FOLDER = "rejected"

INDEX_DTYPE = np.dtype([("offset", "<u8"), ("crc32c", "<u4")])

_TAR_HEADER_BYTES = 512
_TAR_RECORD_BYTES = 10240
_NPY_HEADER_BYTES = 128


def shard_path(folder: Path, name: str) -> Path:
    """The archive of shard ``name`` (six digits) of the data set ``folder``."""
    return folder / SHARD_FOLDER / f"{name}.tar"


def rejected_path(folder: Path, name: str) -> Path:
    """A file of records that were left out."""
    return folder / REJECTED_FOLDER / f"{name}.parquet"


def index_path(folder: Path, name: str) -> Path:
    """The sidecar that holds the offset and the CRC32C of each block."""
    return folder / SHARD_FOLDER / f"{name}.idx"


def documents_path(folder: Path, name: str) -> Path:
    """The sidecar that holds one row per document."""
    return folder / SHARD_FOLDER / f"{name}.docs.parquet"


@dataclass(frozen=True)
class BlockLayout:
    """The arithmetic of a shard file.

    Attributes:
        block_tokens: tokens per block, without the look-ahead token.
        dtype: ``"uint16"`` or ``"uint32"``, stored little-endian.
    """

    block_tokens: int
    dtype: str

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """The dtype of stored tokens, byte order included."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return self.token_dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of the ``block_tokens + 1`` tokens of a block: what its CRC32C covers."""
        return (self.block_tokens + 1) * self.token_bytes

    @property
    def member_stride(self) -> int:
        """Bytes from one member's tar header to the next one's."""
        payload = _NPY_HEADER_BYTES + self.block_bytes
        return _TAR_HEADER_BYTES + -(-payload // _TAR_HEADER_BYTES) * _TAR_HEADER_BYTES

    def data_offset(self, block: int) -> int:
        """Bytes from the start of the shard file to the first token of ``block``."""
        return block * self.member_stride + _TAR_HEADER_BYTES + _NPY_HEADER_BYTES

    def blocks(self, tokens: int) -> int:
        """The number of blocks that hold ``tokens`` valid tokens."""
        return -(-tokens // self.block_tokens)

    def shard_bytes(self, blocks: int) -> int:
        """Bytes of a shard file of ``blocks`` blocks, end-of-archive record included."""
        unpadded = blocks * self.member_stride + 2 * _TAR_HEADER_BYTES
        return -(-unpadded // _TAR_RECORD_BYTES) * _TAR_RECORD_BYTES

    def member_head(self, shard: str, block: int) -> bytes:
        """What precedes the tokens of a member: its tar header, then its npy header."""
        info = tarfile.TarInfo(member_name(shard, block))
        info.size = _NPY_HEADER_BYTES + self.block_bytes
        info.mode = 0o644
        info.mtime = 0
        header = info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
        return header + npy_header(self.token_dtype.str, self.block_tokens + 1, _NPY_HEADER_BYTES)

    def member_tail(self) -> bytes:
        """The zeros that follow a member's tokens up to the next 512-byte boundary."""
        return bytes(self.member_stride - _TAR_HEADER_BYTES - _NPY_HEADER_BYTES - self.block_bytes)

    def archive_end(self, blocks: int) -> bytes:
        """The end-of-archive zero blocks, padded to tar's record of 10,240 bytes."""
        return bytes(self.shard_bytes(blocks) - blocks * self.member_stride)


def nearest_divisors(total: int, wanted: int, multiple_of: int = 1) -> str:
    """The divisors of ``total`` next to ``wanted`` on either side, that are multiples of ``multiple_of`` (one itself),
    for messages: ``512 or 1024``."""
    factors = [factor for factor in range(1, math.isqrt(total) + 1) if total % factor == 0]
    divisors = sorted({*factors, *(total // factor for factor in factors)})
    valid = [divisor for divisor in divisors if divisor % multiple_of == 0]
    below = [divisor for divisor in valid if divisor <= wanted][-1:]
    above = [divisor for divisor in valid if divisor > wanted][:1]
    return " or ".join(map(str, below + above))


def member_name(shard: str, block: int) -> str:
    """The name of a block inside its shard: ``SSSSSS-BBBBBB.npy``."""
    return f"{shard}-{block:06d}.npy"


def npy_header(descr: Any, length: int, total_bytes: int) -> bytes:
    """The version 1.0 ``.npy`` header of a one-dimensional array, padded with spaces to ``total_bytes``."""
    fields = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': ({length},), }}"
    padded = fields.ljust(total_bytes - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode("ascii")


def index_bytes(entries: npt.NDArray[np.void]) -> bytes:
    """The content of an ``.idx`` sidecar (a plain ``.npy``) for ``entries`` of :data:`INDEX_DTYPE`."""
    return npy_header(INDEX_DTYPE.descr, len(entries), _NPY_HEADER_BYTES) + entries.astype(INDEX_DTYPE).tobytes()


def index_size(blocks: int) -> int:
    """The bytes of the ``.idx`` sidecar of a shard of ``blocks`` blocks."""
    return _NPY_HEADER_BYTES + blocks * INDEX_DTYPE.itemsize


def index_entries(content: bytes) -> npt.NDArray[np.void]:
    """The entries in what :func:`index_bytes` made. Its header is not looked at: numpy's parser evaluates it as Python,
    and a damaged one ends in whatever Python makes of that."""
    return np.frombuffer(content, INDEX_DTYPE, offset=_NPY_HEADER_BYTES)


def read_index(path: Path) -> npt.NDArray[np.void]:
    """Read an ``.idx`` sidecar.

    Returns:
        Structured array [blocks] with ``offset`` (bytes from the start of the shard to the block's first token) and
        ``crc32c`` (of the little-endian bytes of the block's ``block_tokens + 1`` tokens).

    Raises:
        DataError: the file is missing or is not such an array.
    """
    advice = f"Run `pretrain-data verify --rebuild-sidecars {path.parent.parent}` to write it again from the shard."
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"the block index {path} is missing. {advice}") from error
    except OSError as error:
        raise DataError(f"the block index {path} can't be read ({error}). {advice}") from error
    entry_bytes = len(content) - _NPY_HEADER_BYTES
    if entry_bytes < 0 or entry_bytes % INDEX_DTYPE.itemsize:
        raise DataError(f"the block index {path} can't be read ({len(content)} bytes are no whole index). {advice}")
    entries = index_entries(content)
    if index_bytes(entries) != content:
        raise DataError(f"the block index {path} does not hold offsets and CRCs. {advice}")
    return entries
