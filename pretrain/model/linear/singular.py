"""Singular values and vectors of a weight, in float64, with signs of their own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.linalg import eigh
from torch import Tensor


class Triplets(NamedTuple):
    """Some of the terms of W = Σ_l σ_l u_l v_lᵀ."""

    u: Tensor
    """[m, k] float64, orthonormal columns."""
    sigma: Tensor
    """[k] float64, descending."""
    v: Tensor
    """[n, k] float64, orthonormal columns; the entry of largest magnitude of each is positive."""

    def product(self) -> Tensor:
        """The sum of these terms: [m, n]."""
        return (self.u * self.sigma) @ self.v.T


def singular_triplets(weight: Tensor, start: int, stop: int) -> Triplets:
    """The terms of ``weight`` from the ``start``-th to before the ``stop``-th largest singular value, from 0.

    They are eigenvectors of the smaller of WᵀW and WWᵀ: of the leading quarter a third of the work of all of W's
    singular vectors. What squaring costs lies far below fp32, in which the factors end up: a singular value σ has a
    relative error of about 2e-16 (σ_1 / σ)², where σ_1 / σ is about twice the side at the small end of a square
    Gaussian matrix. Two libraries, or two numbers of threads, differ by no more, as the vectors themselves fix their
    signs.

    Args:
        weight: [m, n] float64 on the CPU.
        start: at least 0; stop: at most min(m, n).
    """
    wide = weight.shape[0] < weight.shape[1]
    gram = weight @ weight.T if wide else weight.T @ weight
    side = len(gram)
    values, columns = eigh(gram.numpy(), subset_by_index=[side - stop, side - start - 1])  # ascending
    vectors = torch.from_numpy(columns).flip(1)
    sigma = torch.from_numpy(values).flip(0).clamp(min=0.0).sqrt()
    other = (weight.T if wide else weight) @ vectors / sigma
    u, v = (vectors, other) if wide else (other, vectors)
    signs = v.gather(0, v.abs().argmax(0, keepdim=True)).sign()
    return Triplets(u * signs, sigma, v * signs)
