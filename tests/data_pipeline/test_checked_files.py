"""Files between the passes: whatever byte of them turns, whoever reads it is told, and nobody else."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.prepare.checked_files import (
    CheckedRows,
    DamagedFileError,
    opened,
    publish_record,
    publish_rows,
    read_piece,
    read_record,
)

DTYPE = np.dtype([("key", "<u4"), ("value", "u1")])
PER_BLOCK = 4096 // DTYPE.itemsize


@pytest.fixture
def table() -> np.ndarray:
    """Sorted rows: five blocks and a bit."""
    rows = np.zeros(5 * PER_BLOCK + 7, DTYPE)
    rows["key"] = np.sort(np.random.default_rng(0).integers(0, 1 << 30, len(rows)))
    rows["value"] = np.arange(len(rows)) % 251
    return rows


def test_rows_come_back(tmp_path: Path, table: np.ndarray) -> None:
    publish_rows(tmp_path / "rows", table)
    found = CheckedRows(tmp_path / "rows", DTYPE, len(table))
    assert len(found) == len(table)
    assert (found.rows(0, len(table)) == table).all()
    assert (found.rows(PER_BLOCK - 1, PER_BLOCK + 1) == table[PER_BLOCK - 1 : PER_BLOCK + 1]).all()
    places = np.array([3, 2 * PER_BLOCK, 3, len(table) - 1])
    assert (found.take(places) == table[places]).all()
    for value in (0, int(table["key"][PER_BLOCK]), 5_000_000, 1 << 40):
        assert found.place("key", value, 3, 900) == 3 + int(np.searchsorted(table["key"][3:900], value))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (40, 2000)])
def test_rows_of_any_shape_come_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    rows = np.random.default_rng(1).integers(0, 1 << 32, shape, np.uint32)
    publish_rows(tmp_path / "rows", rows)
    found = CheckedRows(tmp_path / "rows", (np.uint32, shape[1:]), shape[0])
    assert (found.rows(0, len(rows)) == rows).all()
    assert (found.take(np.arange(len(rows))[::-2]) == rows[::-2]).all()


def test_every_bit_of_a_file_of_rows_is_checked(tmp_path: Path, table: np.ndarray) -> None:
    """By the reads of the rows it stands among, and by no other."""
    path = tmp_path / "rows"
    publish_rows(path, table)
    written = path.read_bytes()
    begin = len(written) - 4 * 6 - table.nbytes
    for place in (*range(begin), *range(begin, len(written) - 24, 97), *range(len(written) - 24, len(written))):
        content = bytearray(written)
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        with pytest.raises(DamagedFileError, match="rows does not"):
            CheckedRows(path, DTYPE).rows(0, len(table))
        if begin <= place < len(written) - 24:
            found, block = CheckedRows(path, DTYPE), (place - begin) // (PER_BLOCK * DTYPE.itemsize)
            others = np.flatnonzero(np.arange(len(table)) // PER_BLOCK != block)
            assert (found.take(others) == table[others]).all()
            with pytest.raises(DamagedFileError, match=rf"rows {block * PER_BLOCK} to \d+ that were written"):
                found.take(np.array([(place - begin) // DTYPE.itemsize]))


def test_a_search_that_a_wrong_key_misleads_is_told(tmp_path: Path, table: np.ndarray) -> None:
    wrong, misled = table.copy(), 0
    publish_rows(tmp_path / "rows", table)
    begin = (tmp_path / "rows").read_bytes().index(table[:8].tobytes())
    for row in range(1, len(table), 301):
        with open(tmp_path / "rows", "r+b") as handle:
            wrong["key"] = table["key"]
            wrong["key"][row] ^= 1 << 29
            handle.seek(begin)
            handle.write(wrong.data)
        found = CheckedRows(tmp_path / "rows", DTYPE)
        for value in table["key"][::401].tolist():
            try:
                place = found.place("key", value, 0, len(table))
            except DamagedFileError:
                misled += 1
            else:
                assert place == np.searchsorted(table["key"], value)
    assert misled > 10


def test_a_file_in_anothers_place_is_told(tmp_path: Path, table: np.ndarray) -> None:
    """And a block: the sums are of name and place, too."""
    publish_rows(tmp_path / "rows", np.zeros(2 * PER_BLOCK, DTYPE))
    content = (tmp_path / "rows").read_bytes()
    assert content[-4:] != content[-8:-4]
    (tmp_path / "rows").rename(tmp_path / "other")
    with pytest.raises(DamagedFileError, match="other does not begin as it was written"):
        CheckedRows(tmp_path / "other", DTYPE)
    publish_rows(tmp_path / "rows", table)
    with pytest.raises(DamagedFileError, match="rows does not begin"):
        CheckedRows(tmp_path / "rows", DTYPE, len(table) - 1)
    publish_record(tmp_path / "record", [1])
    (tmp_path / "record").rename(tmp_path / "other")
    with pytest.raises(DamagedFileError, match="other does not hold what was written"):
        read_record(tmp_path / "other")


def test_every_bit_and_every_end_of_a_record_is_checked(tmp_path: Path) -> None:
    path, value = tmp_path / "record", {"b": [1, 2.5, "ü"], "a": None}
    publish_record(path, value)
    assert read_record(path) == value
    written = path.read_bytes()
    for place in range(len(written)):
        for bit in range(8):
            content = bytearray(written)
            content[place] ^= 1 << bit
            path.write_bytes(content)
            with pytest.raises(DamagedFileError):
                read_record(path)
        path.write_bytes(written[:place])
        with pytest.raises(DamagedFileError):
            read_record(path)
    path.write_text(json.dumps(value))
    with pytest.raises(DamagedFileError, match="was written by an older version of headrace"):
        read_record(path)
    path.unlink()
    with pytest.raises(DamagedFileError, match="record is missing"):
        read_record(path)


def test_pieces_end_where_they_end(tmp_path: Path) -> None:
    (tmp_path / "pieces").write_bytes(b"one two")
    with opened(tmp_path / "pieces") as handle:
        assert read_piece(handle, 4, 3) == b"two"
        with pytest.raises(DamagedFileError, match="pieces ends at byte 7, before"):
            read_piece(handle, 4, 4)
    with pytest.raises(DamagedFileError, match="nothing is missing"), opened(tmp_path / "nothing"):
        pass


def test_the_error_comes_out_of_worker_processes_as_it_is() -> None:
    error = pickle.loads(pickle.dumps(DamagedFileError("a/b", "is missing")))
    assert isinstance(error, DataError)
    assert (error.path, str(error)) == (Path("a/b"), "a/b is missing.")
