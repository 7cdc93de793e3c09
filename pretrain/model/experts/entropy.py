"""The Tsallis entropy of a router's distribution (DynMoLE, arXiv 2504.00661)."""

from __future__ import annotations

import math

from pydantic import Field
from torch import Tensor

from data_pipeline.settings import Settings


class EntropySettings(Settings):
    """Of hybrid routing and of the entropy loss. The paper (at second hand): order 1.1; its authors' code: order 1.4,
    normalised, smoothing 1e-5."""

    order: float = Field(default=1.1, gt=0.0, le=2.0)
    """q; 1 is Shannon's entropy."""
    normalised: bool = False
    """Divide by the largest entropy that E experts can have, so that it is between 0 and 1."""
    smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Added to every likelihood before."""


def largest_entropy(experts: int, order: float) -> float:
    """Of a uniform distribution: (1 - E^(1-q)) / (q - 1), ln E for q = 1."""
    return math.log(experts) if order == 1.0 else (1.0 - experts ** (1.0 - order)) / (order - 1.0)


def tsallis_entropy(probabilities: Tensor, settings: EntropySettings) -> Tensor:
    """S_q(p) = (1 - Σ p^q) / (q - 1) over the last dimension, Shannon's -Σ p ln p for q = 1: [..., E] -> [...]."""
    q = settings.order
    # the derivative of p^q is infinite at 0 for q < 1, that of p ln p for q = 1
    p = probabilities.clamp(min=1e-30) + settings.smoothing
    entropy = -(p * p.log()).sum(dim=-1) if q == 1.0 else (1.0 - p.pow(q).sum(dim=-1)) / (q - 1.0)
    return entropy / largest_entropy(p.shape[-1], q) if settings.normalised else entropy
