"""The head: from features to logits, or to what the spherical losses need of them, without the logits.

With W [V, d], the mean w of its rows and their covariance C = (W - 1 wᵀ)ᵀ (W - 1 wᵀ) / V [d, d], the logits o = W h
of a token have the mean μ = w·h and the variance σ² = hᵀ C h: O(d²) for each token, once w and C are known, which
depend on the weights alone. So it is with the gradients, from those by μ, σ² and the label's logit o_c of each token:

    by h    g_o w_c + g_μ w + 2 g_σ² C h
    by W    (W - 1 wᵀ) Σ 2 g_σ² h hᵀ / V  +  1 (Σ g_μ h)ᵀ / V  +  g_o h added to the label's row w_c

Two sums over the tokens, [d, d] and [d], are all that the dense part of the latter needs: it is made once for as many
tokens as share the weights (Vincent, de Brébisson and Bouthillier 2015, arXiv 1412.7091, sections 3 and 4). Their
factored weights, whose plain SGD update is O(d²) too, are no use here: AdamW changes every entry of W by a rule that is
not linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kinds.dense import DenseLinear

ROWS = 16_384
"""Rows of W that are copied to the computing dtype at a time."""


class RowStatistics:
    """Mean and covariance of the rows of W, and the sums that the dense part of its gradient needs.

    An engine keeps one and begins it anew with each optimizer step: the weights' statistics are then computed once a
    step, and so is the dense part of the gradient, in the backward pass of the last micro-step.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self, last: bool = True) -> None:
        """Forget everything: the weights have changed, or may have.

        Args:
            last: whether the next backward pass is the last one with these weights.
        """
        self.last = last
        self._known: tuple[Tensor, Tensor] | None = None
        self._sums: list[Tensor] = []

    def of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [d] and covariance [d, d] of the rows of ``weight`` [V, d], at least fp32."""
        if self._known is None:
            with torch.no_grad():
                count = len(weight)
                mean = weight.sum(dim=0, dtype=_computing(weight)) / count
                covariance = mean.new_zeros(len(mean), len(mean))
                for _, rows in _centred(weight, mean):
                    covariance += rows.T @ rows
                self._known = mean, covariance / count
        return self._known

    def add(self, sums: list[Tensor]) -> list[Tensor]:
        """Add a micro-step's sums; returns all of the optimizer step's where it was the last, else nothing."""
        for own, new in zip(self._sums, sums, strict=False):
            own += new
        self._sums = self._sums or sums
        return self._sums if self.last else []


def _computing(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _centred(weight: Tensor, mean: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows less their mean, in pieces."""
    for start in range(0, len(weight), ROWS):
        piece = slice(start, start + ROWS)
        yield piece, weight[piece].to(mean.dtype) - mean


class _Moments(torch.autograd.Function):
    """See :func:`logit_moments`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, statistics: RowStatistics) -> Tensor:
        mean, covariance = statistics.of(weight)
        features = x.to(mean.dtype)
        of_label = (features * F.embedding(labels, weight)).sum(dim=1)
        variance = (features @ covariance * features).sum(dim=1)
        ctx.save_for_backward(x, weight, labels)
        ctx.known, ctx.statistics = (mean, covariance), statistics
        return torch.stack([of_label, features @ mean, variance], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, labels = ctx.saved_tensors
        mean, covariance = ctx.known
        count = len(weight)
        features = x.to(mean.dtype)
        by_label, by_mean, by_variance = gradient.unbind(1)
        twice = 2.0 * by_variance[:, None] * features
        by_features = by_label[:, None] * F.embedding(labels, weight) + by_mean[:, None] * mean + twice @ covariance
        # as the gradient of an embedding: added up in a fixed order on GPUs too
        rows = by_label[:, None] * features
        by_weight = torch.ops.aten.embedding_dense_backward(rows, labels, count, -1, False)
        sums = ctx.statistics.add([twice.T @ features / count, by_mean @ features / count])
        if sums:
            outer, total = sums
            for piece, centred in _centred(weight, mean):
                by_weight[piece] += torch.addmm(total, centred, outer)
        return by_features.to(x.dtype), by_weight.to(weight.dtype), None, None


def logit_moments(x: Tensor, weight: Tensor, labels: Tensor, statistics: RowStatistics | None = None) -> Tensor:
    """The label's logit, and mean and variance of all V logits, of every token.

    Args:
        x: [..., d]; weight: [V, d].
        labels: [...] integers below V.
        statistics: shared by all calls with the same weights; None: by nobody.

    Returns:
        [..., 3], fp32, or float64 where the weight is.
    """
    shared = RowStatistics() if statistics is None else statistics
    flat = _Moments.apply(x.reshape(-1, x.shape[-1]), weight, labels.reshape(-1).long(), shared)  # type: ignore[no-untyped-call]
    moments: Tensor = flat.view(*labels.shape, 3)
    return moments


class Head(DenseLinear):
    """y = x Wᵀ, or :func:`logit_moments` where labels are given."""

    statistics: RowStatistics | None = None
    """Of the optimizer step, where the engine keeps it."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return super().forward(x)
        return logit_moments(x, self.weight, labels, self.statistics)
