"""A keyed bijection of ``range(n)`` that needs no table: any position of a shuffled epoch in O(1).

The network is FE2 of Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002): ``range(n)`` is laid
into a rectangle of about sqrt(n) by sqrt(n) cells, eight rounds add a keyed hash of one coordinate to the other
(modulo its side), and the few cells outside the range are walked through again until the walk is back inside.
The round function is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014). Integers only, so the order is
the same on every platform. Nothing here is a secret: the network shuffles, it does not encrypt.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
UIntArray = npt.NDArray[np.uint64]

ORDER_VERSION = 1
"""Part of every key. Raise it with any change that alters an order: a resume then refuses instead of drifting."""

LARGEST = 1 << 62
ROUNDS = 8


@functools.lru_cache(maxsize=1 << 14)
def derive_keys(seed: int, purpose: str, name: str, number: int) -> UIntArray:
    """Eight 64-bit keys, uint64 [8], unrelated for any two different arguments (BLAKE2b of their JSON).

    The array is shared between callers and read-only.
    """
    message = json.dumps([ORDER_VERSION, seed, purpose, name, number]).encode("ascii")
    keys = np.frombuffer(hashlib.blake2b(message, digest_size=8 * ROUNDS).digest(), "<u8").astype(np.uint64)
    keys.setflags(write=False)
    return keys


def epoch_keys(seed: int, purpose: str, names: Sequence[str], source: IntArray, epoch: IntArray) -> UIntArray:
    """The keys of each source ``names[source]`` [k] in its epoch [k]; uint64 [k, 8]."""
    if not source.size:
        return np.empty((0, ROUNDS), np.uint64)
    if (source == source[0]).all() and (epoch == epoch[0]).all():
        one = derive_keys(seed, purpose, names[int(source[0])], int(epoch[0]))
        return np.broadcast_to(one, (len(source), ROUNDS))
    # three sorts of integers: a third of what a sort of pairs costs
    sources, source_number = np.unique(source, return_inverse=True)
    epochs, epoch_number = np.unique(epoch, return_inverse=True)
    pairs, pair_number = np.unique(source_number * len(epochs) + epoch_number, return_inverse=True)
    pair_sources, pair_epochs = sources[pairs // len(epochs)].tolist(), epochs[pairs % len(epochs)].tolist()
    keys = [derive_keys(seed, purpose, names[s], e) for s, e in zip(pair_sources, pair_epochs, strict=True)]
    return np.stack(keys)[pair_number]


def stream_keys(keys: UIntArray, number: IntArray) -> UIntArray:
    """Output ``number`` [k] of the SplitMix64 streams that begin at ``keys`` [k, 8]: many keys from one derivation."""
    return mix64(keys + number.astype(np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15))


def mix64(values: UIntArray) -> UIntArray:
    """SplitMix64's finaliser: a bijection of 64-bit integers in which every input bit reaches every output bit."""
    mixed = values ^ (values >> np.uint64(30))
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def permute(indices: npt.ArrayLike, n: npt.ArrayLike, keys: UIntArray, *, numbers: IntArray | None = None) -> IntArray:
    """Where each index of ``range(n)`` goes; int64, the shape of ``indices``.

    Args:
        indices: integers [k] in ``range(n)``.
        n: the size of the range, 1 to 2^62; one integer, or one for each index [k].
        keys: the round keys of :func:`derive_keys`: [8], or [k, 8] when each index has its own permutation.
        numbers: [k]: the round keys are these outputs of the streams that begin at ``keys`` (:func:`stream_keys`).

    Raises:
        ValueError: ``n`` is out of bounds or an index lies outside ``range(n)``.
    """
    return _walk(indices, n, keys, inverse=False, numbers=numbers)


def invert(indices: npt.ArrayLike, n: npt.ArrayLike, keys: UIntArray, *, numbers: IntArray | None = None) -> IntArray:
    """The inverse of :func:`permute`, with the same arguments and errors."""
    return _walk(indices, n, keys, inverse=True, numbers=numbers)


def _walk(
    indices: npt.ArrayLike, n: npt.ArrayLike, keys: UIntArray, *, inverse: bool, numbers: IntArray | None
) -> IntArray:
    index, size = np.asarray(indices), np.asarray(n)
    if size.size and not (size.min() >= 1 and size.max() <= LARGEST):
        raise ValueError(f"a permutation needs 1 <= n <= 2^62, not n from {size.min()} to {size.max()}")
    if index.size and not (index.min() >= 0 and (index < size).all()):
        raise ValueError(f"index {index.max() if index.min() >= 0 else index.min()} lies outside range(n)")
    from .kernel import load  # which imports this module

    return load().walk(index.astype(np.int64), size.astype(np.int64), keys, inverse, numbers)


def walk(
    indices: IntArray, sizes: IntArray, keys: UIntArray, inverse: bool, numbers: IntArray | None = None
) -> IntArray:
    """:func:`permute`, or its inverse, with NumPy and without a look at the arguments; the kernels' is equal."""
    values, size = indices.astype(np.uint64), sizes.astype(np.uint64)
    if numbers is not None:
        keys = stream_keys(keys, numbers)
    # the width is a correctly rounded square root, the same everywhere; any width would do, for height makes up for it
    width = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.uint64)
    height = (size + width - np.uint64(1)) // width
    rounds = keys.T
    values = _network(values, width, height, rounds, inverse)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        walked = _network(
            values[outside], _pick(width, outside), _pick(height, outside), _pick(rounds, outside, 2), inverse
        )
        values[outside] = walked
        outside = outside[walked >= _pick(size, outside)]
    return values.astype(np.int64)


def _pick(values: npt.NDArray[Any], where: IntArray, per_index: int = 1) -> npt.NDArray[Any]:
    """The columns ``where``, if there is one column for each index (``per_index`` dimensions), else all of it."""
    return values[..., where] if values.ndim == per_index else values


def _network(cells: UIntArray, width: UIntArray, height: UIntArray, rounds: UIntArray, inverse: bool) -> UIntArray:
    """Eight rounds over the cells of the rectangle: a cell's number is ``x * height + y``."""
    x = cells // height
    y = cells - x * height
    for number in reversed(range(ROUNDS)) if inverse else range(ROUNDS):
        if number % 2 == 0:
            x = _shift(x, y, width, rounds[number], inverse)
        else:
            y = _shift(y, x, height, rounds[number], inverse)
    return x * height + y


def _shift(moved: UIntArray, by: UIntArray, side: UIntArray, key: UIntArray, inverse: bool) -> UIntArray:
    """``moved`` plus (or minus) a keyed hash of ``by``, modulo ``side`` (at most 2^32)."""
    step = mix64(by ^ key) >> np.uint64(32)
    step *= side
    step >>= np.uint64(32)
    if inverse:
        step = side - step
    step += moved
    step -= side * (step >= side)
    return step
