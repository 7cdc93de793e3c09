"""The native kernel against NumPy and plain Python, bit by bit; built, or replaced, and never silently."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import kernel
from data_pipeline.errors import UserError
from data_pipeline.kernel import NativeKernel
from data_pipeline.numpy_kernel import NumpyKernel
from data_pipeline.recycled import Room
from data_pipeline.rows import Part, Rows

EOS = 2
NATIVE = ("all", "without_folding", "portable")
KERNELS = (*NATIVE, "numpy")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Compiled for these tests, with what this CPU has and without."""
    library = tmp_path_factory.mktemp("kernel") / "kernel.so"
    try:
        library.write_bytes(kernel._compile())
    except RuntimeError as error:
        pytest.skip(str(error))
    levels = zip(NATIVE, (2, 1, 0), strict=True)
    return {**{name: NativeKernel(library, level) for name, level in levels}, "numpy": NumpyKernel()}


def in_pieces(tokens: np.ndarray, seed: int) -> Rows:
    """The rows [n, T + 1], some of them in the middle of a larger array, in any order; the others by themselves."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(tokens))
    first, rest = np.split(order, [rng.integers(len(tokens) + 1)])
    room = np.full((3, 1 + 2 * len(tokens), tokens.shape[1]), 7, tokens.dtype)
    above, along = rng.integers(0, 3, len(first)), 1 + rng.permutation(2 * len(tokens))[: len(first)]
    room[above, along] = tokens[first]
    return Rows(len(tokens), [Part(first, room, (above, along)), Part(rest, tokens[rest], (np.arange(len(rest)),))])


@settings(max_examples=200, deadline=None)
@given(
    length=st.one_of(st.integers(2, 20), st.sampled_from([64, 127, 128, 129, 130, 255, 256, 257, 400])),
    size=st.integers(1, 4), count=st.integers(1, 3), share=st.sampled_from([0.0, 0.003, 0.1, 0.7, 1.0]),
    wide=st.booleans(), seed=st.integers(0, 1 << 20), hole=st.sampled_from([0.0, 0.3]), beyond=st.integers(0, 3),
)  # fmt: skip
def test_batches_are_equal_to_the_bit(
    kernels: dict[str, Any], length: int, size: int, count: int, share: float, wide: bool, seed: int, hole: float,
    beyond: int,
) -> None:  # fmt: skip
    """Rows beyond the samples are of a step that has to wait."""
    rng = np.random.default_rng(seed)
    shape = (size * count + beyond, length)
    tokens = rng.integers(3, 1 << 31 if wide else 1 << 16, shape).astype(np.uint32 if wide else np.uint16)
    tokens[rng.random(shape) < share] = EOS
    samples = np.where(rng.random(size * count) < hole, -1, np.arange(size * count))
    made = {name: one.widen(in_pieces(tokens, seed), EOS, samples, size) for name, one in kernels.items()}
    for number in range(count):
        part = slice(number * size, (number + 1) * size)
        expected = np.where(samples[part, None] < 0, EOS, tokens[part].astype(np.int64))
        ends = np.flatnonzero(expected[:, :-1] == EOS)
        inside = [EOS in row[:-2] and sample >= 0 for row, sample in zip(expected, samples[part], strict=True)]
        for name in KERNELS:
            room = Room((size, length))
            room.rows[:] = -1
            found, single = made[name](number, room)
            assert np.array_equal(room.rows, expected), name
            assert found.dtype == np.int32
            assert np.array_equal(found, ends), name
            assert single is not any(inside), name


def test_nothing_is_written_beside_a_batch(kernels: dict[str, Any]) -> None:
    tokens = np.full((4, 130), EOS, np.uint16)
    for name in KERNELS:
        around, room = np.full((4, 2, 130), -1), Room((2, 130))
        room.rows, room.address = around[2], around[2].ctypes.data
        kernels[name].widen(Rows.of(tokens), EOS, np.arange(4), 2)(1, room)
        assert (around[2] == EOS).all()
        assert (around[[0, 1, 3]] == -1).all(), name


def test_the_ends_of_many_batches_do_not_run_into_each_other(kernels: dict[str, Any]) -> None:
    """Nothing but EOS: the memory for the ends is full after a few batches, and earlier ones stay as they were."""
    tokens = np.full((40, 9), EOS, np.uint16)
    for name in KERNELS:
        fill = kernels[name].widen(Rows.of(tokens), EOS, np.arange(40), 2)
        found = [fill(number, Room((2, 9)))[0] for number in range(20)]
        assert all(ends.tolist() == list(range(16)) for ends in found), name


def test_ends_are_not_written_behind_their_memory(kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but EOS: the last row of the last batch that finds room has one end more than tokens, for a moment."""
    empty, behind = np.empty, []

    def guarded(count: int, dtype: Any) -> np.ndarray:
        room = empty(count + 16, dtype)
        room[count:] = 77
        behind.append(room[count:])
        return room[:count]

    tokens = np.full((40, 9), EOS, np.uint16)
    rooms = [Room((2, 9)) for _ in range(20)]
    for name in NATIVE:
        with monkeypatch.context() as patched:
            patched.setattr(kernel.np, "empty", guarded)
            patched.setattr(kernel.np, "empty_like", lambda ends: guarded(len(ends), ends.dtype))
            fill = kernels[name].widen(Rows.of(tokens), EOS, np.arange(40), 2)
            for number, room in enumerate(rooms):
                fill(number, room)
    assert len(behind) >= 2 * len(NATIVE), "the memory of the ends is not what was guarded"
    assert all((guard == 77).all() for guard in behind)


def test_tokens_of_another_dtype_are_taken_too(kernels: dict[str, Any]) -> None:
    tokens = np.array([[5, EOS, 7], [8, 9, 10]], np.int64)
    mixed = Rows(2, [Part(np.array([1]), tokens.astype(np.uint16), (np.array([1]),)),
                     Part(np.array([0]), tokens.astype(np.uint32), (np.array([0]),))])  # fmt: skip
    for name in KERNELS:
        for rows in (Rows.of(tokens), mixed):
            room = Room((2, 3))
            ends, single = kernels[name].widen(rows, EOS, np.arange(2), 2)(0, room)
            assert (room.rows.tolist(), ends.tolist(), single) == (tokens.tolist(), [1], True)


def test_crc32c_is_the_library_s(kernels: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    sizes = [*range(80), *range(250, 330), *range(506, 520), *rng.integers(80, 3000, 60).tolist(), 131_074, 262_148]
    for size in sizes:
        content = rng.integers(0, 256, size + 3).astype(np.uint8)[3:]  # not aligned
        for name in NATIVE:
            assert kernels[name].crc32c(content) == crc32c.crc32c(content.tobytes()), (name, size)
    assert kernels["all"].crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283  # RFC 3720's check value


@pytest.mark.parametrize("name", KERNELS)
def test_reads_up_to_the_first_that_is_wrong(kernels: dict[str, Any], name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (5, 100)).astype(np.uint8)
    path = tmp_path / "file"
    path.write_bytes(b"head" + blocks.tobytes())
    crcs = np.array([crc32c.crc32c(block.tobytes()) for block in blocks], np.uint32)
    offsets, places, at = 4 + 100 * np.arange(5), np.array([4, 0, 3, 6, 1]), np.zeros(1, np.int64)

    def read(size: int, expected: Any, offsets: Any = offsets, places: Any = places) -> tuple[int, Any]:
        memory = np.full((7, 128), 255, np.uint8)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return kernels[name].read(descriptor, offsets, memory, places, size, expected, at), memory
        finally:
            os.close(descriptor)

    for expected in (crcs, None):
        right, memory = read(100, expected)
        assert (right, at[0]) == (5, 4)
        assert np.array_equal(memory[places, :100], blocks)
        memory[places, :100] = 255
        assert (memory == 255).all()
    assert read(100, crcs[::2], offsets[::2], places[::2])[0] == 3
    assert read(100, None, offsets[:0], places[:0])[0] == 0
    wrong = crcs.copy()
    wrong[2] ^= 1
    assert (read(100, wrong)[0], at[0]) == (2, 2)
    os.truncate(path, 4 + 399)
    assert (read(100, crcs)[0], at[0]) == (3, 3)
    assert (read(100, None)[0], at[0]) == (3, 3)
    assert kernels[name].read(-1, offsets, np.empty((7, 100), np.uint8), places, 100, None, at) == 0


def test_without_a_compiler_numpy_does_it_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv(kernel.SWITCH, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    found, words = kernel._find.__wrapped__()
    assert isinstance(found, NumpyKernel)
    assert words == "NumPy, for the native kernel can't be had: no C compiler was found ($CC, cc, gcc, clang)"
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("PATH", os.defpath)
    found, words = kernel._find.__wrapped__()
    assert isinstance(found, NumpyKernel)
    assert words.startswith("NumPy, for the native kernel can't be had: false ended with 1")
    assert not list((tmp_path / "headrace-kernel").iterdir())
    monkeypatch.setenv("CC", '"')
    assert "No closing quotation" in kernel._find.__wrapped__()[1]


def test_the_kernel_is_chosen_by_a_variable_that_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernel.SWITCH, "numpy")
    assert isinstance(kernel._find.__wrapped__()[0], NumpyKernel)
    monkeypatch.setenv(kernel.SWITCH, "fast")
    with pytest.raises(UserError, match="HEADRACE_KERNEL is 'fast'; it may be `auto`"):
        kernel._find.__wrapped__()


def test_the_library_is_kept_complete_and_a_broken_one_is_not_used(
    kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel._built()
    (library,) = (tmp_path / "headrace-kernel").iterdir()
    compiled = library.stat().st_mtime_ns
    kernel._built()
    assert library.stat().st_mtime_ns == compiled
    content = library.read_bytes()
    for broken in (b"", b"\x7fELF", content[: len(content) // 2], content[:-4096] + bytes(4096)):
        library.unlink()
        library.write_bytes(broken)  # to load a half would end the process
        assert isinstance(kernel._built(), NativeKernel)
        (library,) = (tmp_path / "headrace-kernel").iterdir()
        assert library.stem.endswith(hashlib.sha256(library.read_bytes()).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(library))  # no folder can be made there
    assert isinstance(kernel._built(), NativeKernel)


def test_a_kernel_that_computes_wrong_is_refused(
    kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "kernel.c"
    source.write_text(kernel._SOURCE.read_text().replace("0x82f63b78u", "0xedb88320u"))
    monkeypatch.setattr(kernel, "_SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(kernel.SWITCH, raising=False)
    found, words = kernel._find.__wrapped__()
    assert isinstance(found, NumpyKernel)
    assert "computes a wrong CRC32C" in words


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.one_of(st.integers(1, 50), st.integers(1, 1 << 62)), min_size=1, max_size=6),
    count=st.integers(0, 40), keyed=st.sampled_from(["one", "repeated", "each"]), several=st.booleans(),
    streams=st.booleans(), inverse=st.booleans(), seed=st.integers(0, 1 << 20),
)  # fmt: skip
def test_the_order_s_arithmetic_is_equal_to_the_bit(
    kernels: dict[str, Any],
    sizes: list[int],
    count: int,
    keyed: str,
    several: bool,
    streams: bool,
    inverse: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    size = np.array(rng.choice(sizes, count) if several else sizes[0], np.int64)
    indices = (rng.integers(0, 1 << 62, count) % size).astype(np.int64)
    keys = rng.integers(0, 1 << 64, (max(count, 1), 8), np.uint64)
    if keyed != "each":
        keys = keys[0] if keyed == "one" else np.broadcast_to(keys[0], keys.shape)
    numbers = rng.integers(0, 1 << 62, 2 * count)[::2] if streams else None
    before = indices.copy()
    expected = kernels["numpy"].walk(indices, size, keys, inverse, numbers)
    for name in NATIVE:
        assert np.array_equal(kernels[name].walk(indices, size, keys, inverse, numbers), expected), name
    assert np.array_equal(indices, before)


def test_the_order_s_arithmetic_refuses_arrays_of_other_lengths(kernels: dict[str, Any]) -> None:
    keys = np.zeros((3, 8), np.uint64)
    with pytest.raises(ValueError, match="2 indices, 1 sizes of ranges, 3 rows of keys, 2 numbers"):
        kernels["all"].walk(np.arange(2), np.array(5), keys, False)
    with pytest.raises(ValueError, match="3 indices, 2 sizes of ranges, 3 rows of keys, 3 numbers"):
        kernels["all"].walk(np.arange(3), np.array([5, 6]), keys, False)
    with pytest.raises(ValueError, match="3 indices, 1 sizes of ranges, 3 rows of keys, 2 numbers"):
        kernels["all"].walk(np.arange(3), np.array(5), keys, False, np.arange(2))
