"""Which weights magnitude pruning keeps: exactly so many of the largest, the same on every rank.

Magnitudes are compared as fp32. Of equal ones the earlier is kept: by layer, then by place in the layer. What has been
pruned does not come back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

Scope = Literal["layer", "global"]
KeysOf = Callable[[str], Tensor]
"""Makes the :func:`keys` of a layer. Called again for each look at the layer, so that no two have to be in memory."""

_PRUNED = -1
_LOWER_BITS = 15
_UPPER_BINS = 2**16 + 1
"""The upper 16 of the 31 bits of a magnitude, above bin 0 of what has been pruned."""


def sparsity_at(step: int, begin: int, end: int, initial: float, final: float) -> Fraction:
    """The share of weights that are 0 from optimizer step ``step`` on, ``begin`` <= step <= ``end``.

    s_f + (s_i - s_f) (1 - (t - t_0) / (n Δt))³: Zhu and Gupta 2017, arXiv 1710.01878, equation 1.
    """
    first, last = Fraction(str(initial)), Fraction(str(final))
    return last + (first - last) * (1 - Fraction(step - begin, end - begin)) ** 3


def kept_count(size: int, sparsity: Fraction) -> int:
    """How many of ``size`` weights are left when ``sparsity`` of them are pruned, a fraction of one weight not."""
    return size - math.floor(sparsity * size)


def keys(weight: Tensor, mask: Tensor | None) -> Tensor:
    """Integers in the order of the magnitudes, int32 of ``weight``'s shape; -1 where ``mask`` is False already."""
    bits = weight.detach().float().abs().view(torch.int32)  # of numbers that are not negative, the bits are in order
    return bits if mask is None else bits.masked_fill(~mask, _PRUNED)


def masks(sizes: Mapping[str, int], keys_of: KeysOf, sparsity: Fraction, scope: Scope) -> Iterator[tuple[str, Tensor]]:
    """Name and new mask of each layer, in the order of ``sizes``, when ``sparsity`` of the weights are 0.

    Args:
        sizes: entries of each layer by name.
        keys_of: makes the :func:`keys` of a layer.
        scope: ``layer``: each layer loses this share; ``global``: all of them together do.
    """
    if scope == "global":
        yield from largest(list(sizes), keys_of, kept_count(sum(sizes.values()), sparsity))
        return
    for name, size in sizes.items():
        yield from largest([name], {name: keys_of(name)}.__getitem__, kept_count(size, sparsity))


def largest(names: Sequence[str], keys_of: KeysOf, keep: int) -> Iterator[tuple[str, Tensor]]:
    """A mask of each layer, which together are True at the ``keep`` largest keys: bool, in the layers' shapes.

    Fewer are kept where fewer are not pruned already. Looks three times at every layer and holds one at a time: the
    smallest key that is kept is found by counting, first by its upper and then by its lower bits.
    """
    smallest, ties = _smallest_kept(names, keys_of, keep)
    for name in names:
        values = keys_of(name)
        equal = values == smallest
        yield name, (values > smallest) | (equal & (equal.flatten().cumsum(0).view_as(equal) <= ties))
        ties -= int(equal.sum())


def _smallest_kept(names: Sequence[str], keys_of: KeysOf, keep: int) -> tuple[int, int]:
    """The ``keep``-th largest key, and how many of the keys that equal it are kept."""
    upper, above = _bin_of((_upper(keys_of(name)) for name in names), keep, _UPPER_BINS)
    if upper == 0:
        return _PRUNED, 0
    lower, above_lower = _bin_of((_lower(keys_of(name), upper) for name in names), keep - above, 2**_LOWER_BITS)
    return (upper - 1 << _LOWER_BITS) + lower, keep - above - above_lower


def _upper(values: Tensor) -> Tensor:
    return (values >> _LOWER_BITS) + 1


def _lower(values: Tensor, upper: int) -> Tensor:
    return values[_upper(values) == upper].bitwise_and(2**_LOWER_BITS - 1)


def _bin_of(members: Iterator[Tensor], rank: int, bins: int) -> tuple[int, int]:
    """The bin that holds the ``rank``-th largest of all ``members`` (0: there are fewer), and how many lie above it."""
    counts = torch.zeros(bins, dtype=torch.int64)
    for each in members:
        counts += torch.bincount(each.flatten(), minlength=bins).cpu()
    at_least = counts.flip(0).cumsum(0).flip(0)
    found = int((at_least >= rank).sum().clamp(min=1)) - 1  # falling, so that the bins that reach it come first
    return found, int(at_least[found] - counts[found])
