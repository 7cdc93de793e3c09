"""The Z-loss of de Brébisson and Vincent (2016, arXiv 1604.08859); nothing to do with PaLM's z-loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..base import LossSettings

SMALLEST_VARIANCE = 1e-12
"""Logits of less variance, as those of a head that is 0, count as of this one: z has no value there."""


class SphericalZSettings(LossSettings):
    """log(1 + exp(a (b - z))) / a, where z is the label's logit less the mean of all V logits, over their standard
    deviation (of the V, not of a sample of them).

    It is the same for logits s o + t, s > 0, and is no likelihood. z is at most sqrt(V - 1). Loss and gradient take
    O(d²) for each token, whatever V (:mod:`pretrain.model.linear.head`).
    """

    kind: Literal["spherical_z"] = "spherical_z"
    a: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Sharpness: the larger, the more the loss is a hinge at z = b. To be tuned."""
    b: float = Field(default=10.0, allow_inf_nan=False)
    """The z from which on a token costs little. To be tuned."""
    from_moments: ClassVar[bool] = True

    def of_tokens(self, output: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
        of_label, mean, variance = output.unbind(-1)
        z = (of_label - mean) / variance.clamp(min=SMALLEST_VARIANCE).sqrt()
        losses = -F.logsigmoid(self.a * (z - self.b)) / self.a
        return losses.masked_fill(~loss_mask, 0.0)

    def measures(self) -> Mapping[str, Callable[[Tensor, Tensor], Tensor]]:
        return {"loss": self._of_logits, "accuracy": _is_first, "reciprocal_rank": _reciprocal_rank}

    def _of_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits = logits.float()
        variance, mean = torch.var_mean(logits, dim=-1, correction=0)
        of_label = logits.gather(-1, labels[..., None].long())[..., 0]
        moments = torch.stack([of_label, mean, variance], dim=-1)
        return self.of_tokens(moments, labels, torch.ones_like(labels, dtype=torch.bool))


def _ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """How many logits are not below the label's: 1 where it is the largest and no other equals it."""
    return (~(logits < logits.gather(-1, labels[..., None].long()))).sum(dim=-1)


def _is_first(logits: Tensor, labels: Tensor) -> Tensor:
    return (_ranks(logits, labels) == 1).float()


def _reciprocal_rank(logits: Tensor, labels: Tensor) -> Tensor:
    return 1.0 / _ranks(logits, labels)
