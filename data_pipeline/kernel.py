"""The native kernel (``kernel.c``): compiled when it is first wanted, checked, and bound by ctypes.

Nothing is built at installation, so that a clone, a code snapshot and an installed package behave alike: the library
lies in the user's cache folder under a hash of all that it depends on, and a process that does not find it there
compiles it (a second). Without a compiler NumPy does the same, more slowly; :func:`describe` says which it is.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import numpy.typing as npt

from .errors import UserError
from .files import publish_bytes, sha256_file
from .numpy_kernel import NumpyKernel, Widen
from .permutation import ROUNDS, IntArray, UIntArray, walk
from .recycled import Room
from .rows import Rows

SWITCH = "HEADRACE_KERNEL"
"""The environment variable that chooses: unset or ``auto``, or ``numpy``."""

_SOURCE = Path(__file__).with_name("kernel.c")
_FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fPIC", "-shared")
_LIBRARIES = ("-lm",)
_COMPILERS = ("cc", "gcc", "clang")
_COMPILE_SECONDS = 120
_TOKENS = {np.dtype("<u2"), np.dtype("<u4")}
_WIDTHS = ("plain", "AVX2", "AVX-512")
_CRCS = ("tables", "the CPU", "VPCLMULQDQ")
_ALL = 2
_BATCHES_OF_ENDS = 4
"""So many batches that are nothing but EOS have room for their ends in one piece of memory; hundreds as they are."""


class _RowTable(ctypes.Structure):
    """``struct rows`` of the kernel."""

    _fields_ = (
        ("sources", ctypes.c_void_p),
        ("samples", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("token_bytes", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("ends", ctypes.c_void_p),
        ("eos", ctypes.c_uint32),
        ("level", ctypes.c_int),
    )


class NativeKernel:
    """The functions of a compiled kernel; all of them let other threads run meanwhile.

    Args:
        library: the compiled file.
        level: what may be used of this CPU, 0: what any of its kind has, 1: its CRC32C instruction and wider vectors
            too, 2: all.

    Raises:
        OSError: it can't be loaded, or does not compute what it should.
    """

    def __init__(self, library: Path, level: int = _ALL) -> None:
        loaded = ctypes.CDLL(str(library))
        self._level = level
        self._crc32c = _declare(loaded.headrace_crc32c, ctypes.c_uint32, "pid")
        self._read = _declare(loaded.headrace_read, ctypes.c_int64, "dippippd")
        self._batch = _declare(loaded.headrace_batch, ctypes.c_int64, "pdp")
        self._walk = _declare(loaded.headrace_walk, None, "ippipipd")
        features = _declare(loaded.headrace_features, ctypes.c_int, "d")(level)
        self.features = f"CRC32C by {_CRCS[features & 3]}, {_WIDTHS[features >> 2]} vectors"
        """What of this CPU is used."""
        example = np.arange(10_007, dtype=np.uint64).astype(np.uint8)
        if self.crc32c(example) != crc32c.crc32c(example.data):
            raise OSError(f"{library} computes a wrong CRC32C")
        sizes = np.array([1, 10, 10**6 + 3, 2**31 - 1, 2**53 + 1, 2**62])
        keys, spread = np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15), sizes * 2 // 3
        for inverse, numbers in itertools.product((False, True), (None, sizes // 7)):
            arguments = spread, sizes, keys, inverse, numbers
            if not np.array_equal(self.walk(*arguments), walk(*arguments)):
                raise OSError(f"{library} computes a wrong order")

    def crc32c(self, content: npt.NDArray[np.uint8]) -> int:
        """The CRC32C of some bytes [n], contiguous."""
        return int(self._crc32c(content.ctypes.data, content.size, self._level))

    def walk(
        self, indices: IntArray, sizes: IntArray, keys: UIntArray, inverse: bool, numbers: IntArray | None = None
    ) -> IntArray:
        """As :meth:`NumpyKernel.walk`."""
        found, sizes, keys = indices.copy(), np.ascontiguousarray(sizes).ravel(), keys.reshape(-1, ROUNDS)
        count = found.size
        wanted = count if numbers is None else numbers.size
        if sizes.size not in (1, count) or len(keys) not in (1, count) or wanted != count:
            raise ValueError(
                f"{count} indices, {sizes.size} sizes of ranges, {len(keys)} rows of keys, {wanted} numbers"
            )
        if keys.strides[0] == 0:
            keys = keys[:1]
        keys = np.ascontiguousarray(keys)
        outputs = None if numbers is None else (numbers := np.ascontiguousarray(numbers)).ctypes.data
        steps = int(sizes.size > 1), ROUNDS * int(len(keys) > 1)
        pointers = (found.ctypes.data, sizes.ctypes.data, steps[0], keys.ctypes.data, steps[1], outputs)
        self._walk(count, *pointers, int(inverse))
        return found

    def read(
        self,
        descriptor: int,
        offsets: IntArray,
        memory: npt.NDArray[np.uint8],
        places: IntArray,
        size: int,
        expected: npt.NDArray[np.uint32] | None,
        at: npt.NDArray[np.int64],
    ) -> int:
        """As :meth:`NumpyKernel.read`."""
        into = memory.ctypes.data + places * memory.strides[0]
        offsets = np.ascontiguousarray(offsets)
        crcs = None if expected is None else (expected := np.ascontiguousarray(expected)).ctypes.data
        pointers = (offsets.ctypes.data, into.ctypes.data, size, crcs, at.ctypes.data)
        return int(self._read(descriptor, len(offsets), *pointers, self._level))

    def widen(self, rows: Rows, eos_id: int, samples: IntArray, size: int) -> Widen:
        """As :meth:`NumpyKernel.widen`; the memory of the rows must stay as it is until the last batch is made."""
        dtypes = rows.dtypes
        if len(dtypes) > 1 or not dtypes <= _TOKENS:
            return NumpyKernel().widen(rows, eos_id, samples, size)
        sources, samples = rows.addresses(), np.ascontiguousarray(samples)
        (dtype,) = dtypes
        most = size * (rows.length - 1) + 1
        ends, used = np.empty(_BATCHES_OF_ENDS * most, np.int32), 0
        table = _RowTable(
            sources.ctypes.data, samples.ctypes.data, len(samples), rows.length, dtype.itemsize, size,
            ends.ctypes.data, eos_id, self._level,
        )  # fmt: skip
        batch, pointer, alive = self._batch, ctypes.addressof(table), (rows, sources, samples, table)

        def fill(number: int, room: Room) -> tuple[npt.NDArray[np.int32], bool]:
            nonlocal ends, used
            assert alive
            if used + most > len(ends):
                ends, used = np.empty_like(ends), 0
                table.ends = ends.ctypes.data
            begin, found = used, batch(pointer, number, room.address)
            used += found >> 1
            return ends[begin:used], found & 1 == 1

        return fill


Kernel = NativeKernel | NumpyKernel


def load() -> Kernel:
    """What makes batches in this process."""
    return _find()[0]


def describe() -> str:
    """The same in words."""
    return _find()[1]


@cache
def _find() -> tuple[Kernel, str]:
    chosen = os.environ.get(SWITCH) or "auto"
    if chosen not in ("auto", "numpy"):
        raise UserError(f"{SWITCH} is {chosen!r}; it may be `auto` (or unset) or `numpy`.")
    if chosen == "numpy":
        return NumpyKernel(), f"NumPy, for {SWITCH}=numpy"
    if sys.byteorder != "little" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return NumpyKernel(), "NumPy, for the native kernel needs a little-endian machine of 64 bits"
    try:
        kernel = _built()
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        return NumpyKernel(), f"NumPy, for the native kernel can't be had: {' '.join(str(error).split())}"
    return kernel, f"the native kernel ({kernel.features})"


def _built() -> NativeKernel:
    """The kernel from the cache folder, or compiled to there, or to a folder that lasts as long as loading it."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "headrace-kernel"
        folder.mkdir(parents=True, exist_ok=True)
        key = _key()
        for library in folder.glob(f"{key}-*.so"):
            if library.stem == f"{key}-{sha256_file(library)}":
                return NativeKernel(library)
            library.unlink(missing_ok=True)  # cut off or changed: loading it could end the process
        content = _compile()
        library = folder / f"{key}-{hashlib.sha256(content).hexdigest()}.so"
        publish_bytes(library, content)
        return NativeKernel(library)
    except (OSError, RuntimeError):  # a folder that can't be written, no home, what another machine compiled
        with tempfile.TemporaryDirectory(prefix="headrace-kernel-") as temporary:
            library = Path(temporary) / "kernel.so"
            library.write_bytes(_compile())
            return NativeKernel(library)


def _key() -> str:
    """A hash of all that the compiled file depends on."""
    parts = (
        _SOURCE.read_bytes(),
        *_FLAGS,
        *_LIBRARIES,
        os.environ.get("CC", ""),
        platform.machine(),
        sys.platform,
        *platform.libc_ver(),
    )
    return hashlib.sha256(b"\0".join(part if isinstance(part, bytes) else part.encode() for part in parts)).hexdigest()


def _compile() -> bytes:
    """The library.

    Raises:
        RuntimeError: there is no compiler, or it refuses.
    """
    try:
        command = shlex.split(os.environ.get("CC", "")) or [name for name in _COMPILERS if shutil.which(name)][:1]
    except ValueError as error:
        raise RuntimeError(f"$CC is {os.environ['CC']!r}: {error}") from error
    if not command:
        raise RuntimeError(f"no C compiler was found ($CC, {', '.join(_COMPILERS)})")
    with tempfile.TemporaryDirectory(prefix="headrace-kernel-") as folder:
        library = Path(folder) / "kernel.so"
        done = subprocess.run(
            [*command, *_FLAGS, "-o", str(library), str(_SOURCE), *_LIBRARIES],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            timeout=_COMPILE_SECONDS,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}: {done.stdout[-500:]}")
        return library.read_bytes()


_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_int}


def _declare(function: Any, result: Any, arguments: str) -> Any:
    function.restype, function.argtypes = result, [_TYPES[kind] for kind in arguments]
    return function
