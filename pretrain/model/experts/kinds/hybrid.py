"""Hybrid routing (DynMoLE, arXiv 2504.00661): all experts where the router is undecided, few where it is not."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..entropy import tsallis_entropy
from ..routing import Choice, RoutingSettings, Scores

if TYPE_CHECKING:
    from ..settings import ExpertsSettings


class HybridSettings(RoutingSettings):
    """A token whose router's distribution p has an entropy above ``threshold`` goes to all experts, weighed by p.
    Another one goes to the most likely experts up to the one with which their sum reaches ``top_p``, and at least to
    ``top_k``; their weights are made to sum to 1.

    The entropy is ``model.experts.entropy``'s. Every token has E slots, most of them empty: for small E.
    """

    kind: Literal["hybrid"] = "hybrid"
    takes_bias: ClassVar[bool] = False
    threshold: float = Field(default=0.9, ge=0.0, allow_inf_nan=False)
    """Entropy above which a token goes to all experts: in nats of the entropy's order, or, where the entropy is
    normalised, a share of the largest. Sources disagree which of the two the paper's 0.9 is."""
    top_p: float = Field(default=0.75, gt=0.0, le=1.0)
    """Sum of the likelihoods of the experts of a token that the router is decided about."""

    def check(self, settings: ExpertsSettings) -> None:
        if settings.entropy is None:
            raise ValueError("routing hybrid needs entropy, by which it decides; give model.experts.entropy")
        if settings.score != "softmax" or not settings.normalised:
            raise ValueError(
                "routing hybrid weighs by softmax scores that sum to 1; set score=softmax, normalised=true"
            )
        if settings.groups is not None or settings.capacity is not None:
            raise ValueError("routing hybrid may use all experts: it has neither groups nor capacity; leave them out")

    def choose(self, scores: Scores, settings: ExpertsSettings, counted: Tensor) -> Choice:
        assert settings.entropy is not None
        likely, experts = scores.probabilities.sort(dim=-1, descending=True, stable=True)
        with torch.no_grad():
            undecided = tsallis_entropy(scores.probabilities, settings.entropy) > self.threshold
            before = likely.cumsum(dim=-1) - likely
            kept = (before < self.top_p) | undecided[..., None]
            kept[..., : settings.top_k] = True
        return Choice(experts, likely, kept)
