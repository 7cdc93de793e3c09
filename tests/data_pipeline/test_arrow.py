"""Parquet files in memory: read without a thread that outlives the interpreter."""

import io
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.arrow import parquet_table

COUNT_THREADS = """
import sys, psutil
from data_pipeline.arrow import parquet_table
content = sys.stdin.buffer.read()
before = psutil.Process().num_threads()
assert parquet_table(content).num_rows == 3
print(psutil.Process().num_threads() - before)
"""


def content() -> bytes:
    to = io.BytesIO()
    pq.write_table(pa.table({"key": ["a", "b", "c"], "number": [1, 2, 3]}), to)
    return to.getvalue()


def test_the_rows() -> None:
    assert parquet_table(content()).to_pydict() == {"key": ["a", "b", "c"], "number": [1, 2, 3]}


def test_damage_is_an_arrow_error() -> None:
    with pytest.raises(pa.ArrowException):
        parquet_table(content()[:-4])


def test_starts_no_thread() -> None:
    """One that holds Python's bytes when the interpreter shuts down ends the process by SIGABRT."""
    run = subprocess.run([sys.executable, "-c", COUNT_THREADS], input=content(), capture_output=True, check=True)
    assert int(run.stdout) == 0
