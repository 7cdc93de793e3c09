"""Arrow arrays from plain buffers. pyarrow's own conversions import pandas, which takes 0.3 s and 40 MB in every
process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq


def numbers(values: npt.NDArray[Any], kind: Any) -> Any:
    """An array of Arrow type ``kind`` over the memory of ``values``, whose items are as wide."""
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def strings(values: Sequence[bytes]) -> Any:
    """A string array of UTF-8 ``values``, of together less than 2 GiB."""
    ends = np.cumsum([0, *map(len, values)], dtype=np.int64)
    if ends[-1] > np.iinfo(np.int32).max:
        raise OverflowError(f"{ends[-1]} bytes of text in one column")
    buffers = [None, pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(pa.string(), len(values), buffers)


def values(array: Any, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """A copy of the values of an Arrow array whose items have the width of ``dtype``."""
    return np.frombuffer(array.buffers()[1], dtype)[array.offset : array.offset + len(array)].copy()


def parquet_table(content: bytes) -> Any:
    """The table of a Parquet file in memory, read by the calling thread alone.

    ``pq.read_table`` would start a thread that holds on to the bytes: where it lets go of them while the interpreter
    shuts down, the process dies by SIGABRT after its work was done.

    Raises:
        pyarrow.ArrowException: it is damaged.
    """
    return pq.ParquetFile(pa.BufferReader(content), pre_buffer=False).read(use_threads=False)
