"""Files that one pass leaves to another, read only as they were written: a turned bit, a cut, a file that is missing or
has changed places with another one is an error of the read that meets it.

*Rows* (:func:`publish_rows`, :class:`CheckedRows`): one table, in blocks of about a page with a CRC32C each, so that
who wants a few rows reads and checks a few. *Pieces* (:func:`piece_sums`, :func:`check_pieces`): texts or tokens end to
end, whose places and CRC32Cs stand in such a table. *Whole files* (:func:`publish_whole`, :func:`publish_record`):
bytes, or JSON, with one CRC32C at the end. The sums of rows and of whole files are of the file's name as well.
"""

from __future__ import annotations

import io
import json
import mmap
import re
import struct
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from ..errors import DataError
from ..files import publish, publish_bytes

if TYPE_CHECKING:
    from typing_extensions import Buffer

SUM: Final = np.dtype("<u4")
_BLOCK_BYTES: Final = 4096
_HEAD: Final = struct.Struct("<16sQQI")
"""Magic, rows, bytes of a row, and the CRC32C of the file's name and what stands before it."""
_MAGIC: Final = b"headrace rows 1\n"
_END: Final = re.compile(rb"\ncrc32c ([0-9a-f]{8})\n")
_END_BYTES: Final = 17


class DamagedFileError(DataError):
    """A file of `prepare`'s own is not what was written there.

    Attributes:
        path: the file.
        problem: what is wrong with it: the rest of a sentence about it.
    """

    def __init__(self, path: str | Path, problem: str) -> None:
        super().__init__(path, problem)
        self.path, self.problem = Path(path), problem

    def __str__(self) -> str:
        return f"{self.path} {self.problem}."


def publish_rows(path: Path, rows: npt.NDArray[Any]) -> None:
    """Publish ``rows`` [n, ...] of any dtype of fixed size."""
    rows = np.ascontiguousarray(rows)
    row_bytes = rows.dtype.itemsize * int(np.prod(rows.shape[1:], dtype=np.int64))
    head, seed = _head(path.name, len(rows), row_bytes)
    content = rows.reshape(-1).view(np.uint8).data
    step = _rows_per_block(row_bytes) * row_bytes
    blocks = range(-(-len(content) // step) if len(content) else 0)
    sums = np.array([_block_sum(content[step * block : step * (block + 1)], seed, block) for block in blocks], SUM)
    with publish(path) as handle:
        handle.write(head)
        handle.write(content)
        handle.write(sums.data)


class CheckedRows:
    """The rows that :func:`publish_rows` wrote to ``path``: mapped, and each block checked before it is used.

    Args:
        path: the file.
        dtype: of one row, a subarray dtype (``(np.uint32, (128,))``) if rows have several columns.
        count: the rows there should be, if that is known.

    Raises:
        DamagedFileError: (by every method, too) it is missing, or not as it was written.
    """

    def __init__(self, path: str | Path, dtype: npt.DTypeLike, count: int | None = None) -> None:
        self.path = Path(path)
        row_bytes = np.dtype(dtype).itemsize
        with opened(path) as handle:
            head = handle.read(_HEAD.size)
            rows = _HEAD.unpack(head)[1] if len(head) == _HEAD.size else 0
            wanted, self._seed = _head(self.path.name, rows, row_bytes)
            if head != wanted or count not in (None, rows):
                raise DamagedFileError(path, "does not begin as it was written")
            self._per_block = _rows_per_block(row_bytes)
            end, blocks = _HEAD.size + rows * row_bytes, -(-rows // self._per_block)
            if (size := handle.seek(0, io.SEEK_END)) != end + blocks * SUM.itemsize:
                raise DamagedFileError(path, f"has {size:,} bytes, not as many as were written")
            content = memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
        self._rows: npt.NDArray[Any] = np.ndarray((rows,), dtype, content, _HEAD.size)
        self._sums: npt.NDArray[np.uint32] = np.ndarray((blocks,), SUM, content, end)
        self._content = content[_HEAD.size : end]
        self._block_bytes = self._per_block * row_bytes

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, first: int, last: int) -> npt.NDArray[Any]:
        """[last - first, ...] the rows ``first`` to ``last``: a view of the mapping."""
        if first < last:
            self._check(range(first // self._per_block, -(-last // self._per_block)))
        return self._rows[first:last]

    def take(self, places: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """[places, ...] the rows at ``places``."""
        self._check(np.unique(places // self._per_block).tolist())
        taken: npt.NDArray[Any] = self._rows[places]
        return taken

    def place(self, column: str, value: int, first: int, last: int) -> int:
        """The first of the rows ``first`` to ``last``, which are sorted by ``column``, where it is not below ``value``.

        Touches a page per step. A search that a wrong value misleads ends beside that value, so that it is enough to
        check the rows on either side of the place.
        """
        found = bisect_left(self._rows[column], value, first, last)
        self.rows(max(first, found - 1), min(last, found + 1))
        return found

    def _check(self, blocks: Iterable[int]) -> None:
        content, step, seed, sums = self._content, self._block_bytes, self._seed, self._sums
        for block in blocks:
            if _block_sum(content[step * block : step * (block + 1)], seed, block) != sums[block]:
                first = block * self._per_block
                raise DamagedFileError(
                    self.path, f"does not hold the rows {first} to {first + self._per_block} that were written"
                )


def piece_sums(pieces: Iterable[Buffer]) -> list[int]:
    """The CRC32C of each piece."""
    return [crc32c(piece) for piece in pieces]


def check_pieces(path: str | Path, pieces: Sequence[Buffer], sums: npt.NDArray[np.uint32]) -> None:
    """Compare ``pieces`` of a file with their ``sums`` [pieces].

    Raises:
        DamagedFileError: some differ.
    """
    found = piece_sums(pieces)
    if found != sums.tolist():
        wrong = int(np.count_nonzero(np.array(found, SUM) != sums))
        raise DamagedFileError(path, f"does not hold what was written (of {len(found)} documents read, in {wrong})")


@contextmanager
def opened(path: str | Path) -> Iterator[io.BufferedReader]:
    """The file ``path`` for reading.

    Raises:
        DamagedFileError: there is none.
    """
    try:
        handle = open(path, "rb")  # noqa: SIM115  # closed below; a file that lacks is told from what the body raises
    except FileNotFoundError as error:
        raise DamagedFileError(path, "is missing") from error
    with handle:
        yield handle


def read_piece(handle: io.BufferedReader, start: int, size: int) -> bytes:
    """``size`` bytes of an opened file from byte ``start`` on.

    Raises:
        DamagedFileError: it ends before.
    """
    handle.seek(start)
    content = handle.read(size)
    if len(content) != size:
        raise DamagedFileError(handle.name, f"ends at byte {start + len(content):,}, before what was written there")
    return content


def publish_whole(path: Path, content: bytes) -> None:
    """Publish ``content``, which is to be read in one go, with its sum behind it."""
    publish_bytes(path, content + b"\ncrc32c %08x\n" % crc32c(content, crc32c(path.name.encode())))


def read_whole(path: Path) -> bytes:
    """What :func:`publish_whole` wrote to ``path``.

    Raises:
        DamagedFileError: it is missing, or not as it was written.
    """
    with opened(path) as handle:
        found = handle.read()
    content, end = found[:-_END_BYTES], _END.fullmatch(found[-_END_BYTES:])
    if end is None or int(end[1], 16) != crc32c(content, crc32c(path.name.encode())):
        raise DamagedFileError(path, "does not hold what was written")
    return content


def publish_record(path: Path, value: Any) -> None:
    """Publish ``value`` as JSON, with its sum behind it."""
    publish_whole(path, json.dumps(value, sort_keys=True).encode())


def read_record(path: Path) -> Any:
    """What :func:`publish_record` wrote to ``path``.

    Raises:
        DamagedFileError: it is missing, or not as it was written; or as older versions wrote it, without a sum.
    """
    try:
        return json.loads(read_whole(path))
    except DamagedFileError as error:
        with suppress(OSError, ValueError):
            json.loads(path.read_bytes())
            raise DamagedFileError(path, "was written by an older version of headrace, without a checksum") from error
        raise


def _head(name: str, rows: int, row_bytes: int) -> tuple[bytes, int]:
    """The head of a file of rows, and what the sums of its blocks begin with."""
    head = _HEAD.pack(_MAGIC, rows, row_bytes, 0)[: -SUM.itemsize]
    seed = crc32c(head, crc32c(name.encode()))
    return head + seed.to_bytes(SUM.itemsize, "little"), seed


def _block_sum(content: Buffer, seed: int, block: int) -> int:
    return crc32c(content, (seed + block) & 0xFFFFFFFF)


def _rows_per_block(row_bytes: int) -> int:
    return max(1, _BLOCK_BYTES // max(1, row_bytes))
