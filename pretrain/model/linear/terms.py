"""What a linear layer computes, as data: the terms of its output, by the names of the layer's own tensors.

From them follow the dense weight that the layer amounts to, whether two layers compute the same, and a layer for
programs that know nothing of this package (``pretrain/export/modeling_headrace.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Term(NamedTuple):
    """``scale`` · f(x[..., ``columns``] ``down``ᵀ) Wᵀ for x [..., n]; a layer's output [..., m] is the sum of terms.

    W is ``weight`` [m, r]; or, with ``mask``, its entries where the mask is True; or, with ``places``, the values
    ``weight`` [k] at these places of the flattened W, which is 0 elsewhere.
    """

    weight: str
    down: str | None = None
    """[r, n], or, with ``columns``, [r, number of columns]; None: the identity, and no f."""
    activation: str = "identity"
    """f, by torch's name: ``silu``, ``gelu``, ``relu``."""
    columns: str | None = None
    """Input features that the term sees, int64; None: all."""
    mask: str | None = None
    places: str | None = None
    scale: float = 1.0


DENSE = (Term("weight"),)
"""The terms of a dense layer."""


def mergeable(terms: Sequence[Term]) -> bool:
    """Whether a dense layer can compute the same: no activation stands between factors."""
    return all(term.activation == "identity" for term in terms)


def merged(terms: Sequence[Term], read: Callable[[str], Tensor], in_features: int, out_features: int) -> Tensor:
    """The weight [m, n] of the dense layer that computes the same as a :func:`mergeable` one, in fp32.

    Args:
        terms: of the layer; that of a dense layer gives its weight as it is.
        read: gives a tensor of the layer by its name.
    """
    if terms == DENSE:
        return read("weight")
    whole = torch.zeros(out_features, in_features)
    for term in terms:
        weight = read(term.weight).float()
        if term.places is not None:
            sparse = torch.zeros(out_features * in_features)
            sparse[read(term.places).long()] = weight
            weight = sparse.view(out_features, in_features)
        if term.mask is not None:
            weight = torch.where(read(term.mask), weight, 0.0)
        if term.down is not None:
            weight = weight @ read(term.down).float()
        columns = slice(None) if term.columns is None else read(term.columns)
        whole[:, columns] += weight * term.scale
    return whole
