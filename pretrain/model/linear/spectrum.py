"""Singular values and vectors of a weight, in float64, with signs of their own."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Triplets(NamedTuple):
    """Some of the terms of W = Σ_l σ_l u_l v_lᵀ."""

    u: Tensor
    """[m, k] float64, orthonormal columns."""
    sigma: Tensor
    """[k] float64, descending."""
    v: Tensor
    """[n, k] float64, orthonormal columns; the entry of largest magnitude of each is positive."""


class Spectrum:
    """The singular value decomposition of ``weight`` [m, n], made once and only as far as it is asked for.

    It is the eigendecomposition of the smaller of WᵀW and WWᵀ, half the work of a decomposition of W itself. What
    squaring costs is far below fp32, in which the factors end up: a singular value σ has the relative error
    2e-16 (σ_1 / σ)², and σ_1 / σ is about twice the number of columns at the small end of a square Gaussian matrix. Two
    libraries, or two numbers of threads, differ by no more than that, for the signs are fixed by the vectors.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.double()

    @property
    def count(self) -> int:
        """Singular values in all: the smaller side."""
        return min(self.weight.shape)

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues, descending, and eigenvectors on the smaller side."""
        w = self.weight
        values, vectors = torch.linalg.eigh(w @ w.T if w.shape[0] < w.shape[1] else w.T @ w)
        return values.flip(0), vectors.flip(1)

    def triplets(self, start: int, stop: int) -> Triplets:
        """The terms from the ``start``-th to before the ``stop``-th largest singular value, counted from 0."""
        values, vectors = (each[..., start:stop] for each in self._eigen)
        sigma = values.clamp(min=0.0).sqrt()
        wide = self.weight.shape[0] < self.weight.shape[1]
        other = (self.weight.T if wide else self.weight) @ vectors / sigma
        u, v = (vectors, other) if wide else (other, vectors)
        signs = v.gather(0, v.abs().argmax(0, keepdim=True)).sign()
        return Triplets(u * signs, sigma, v * signs)
