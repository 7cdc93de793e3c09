"""What a way of choosing experts is: settings that turn a router's scores into slots."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from data_pipeline.settings import Settings

if TYPE_CHECKING:
    from .settings import ExpertsSettings


class Scores(NamedTuple):
    """What a router says of the tokens of a micro-batch; fp32."""

    logits: Tensor
    """[b, T, E]."""
    scores: Tensor
    """[b, T, E]: softmax or sigmoid of the logits, what the experts' outputs are weighed by."""
    probabilities: Tensor
    """[b, T, E]: the scores made to sum to 1, what losses and statistics see."""
    bias: Tensor
    """[E]: added to the scores where experts are chosen, and nowhere else."""


class Choice(NamedTuple):
    """Which experts each token goes to: K slots a token, of which some may stay empty."""

    experts: Tensor
    """[b, T, K] int64."""
    weights: Tensor
    """[b, T, K] fp32, with gradient, before normalisation and scaling."""
    kept: Tensor | None = None
    """[b, T, K] bool, False where a slot is empty; None: none is."""

    def counts(self, experts: int, counted: Tensor) -> Tensor:
        """Filled slots of each expert over the tokens that count, by sequence: [b, E] fp32, exact below 2^24.

        Args:
            counted: [b, T] bool.
        """
        filled = counted[..., None].expand_as(self.experts)
        filled = filled if self.kept is None else filled & self.kept
        zeros = torch.zeros(len(counted), experts, device=counted.device)
        return zeros.scatter_add_(1, self.experts.flatten(1), filled.flatten(1).float())


class RoutingSettings(Settings):
    """Base of the ways to choose experts; each lives in a module of ``pretrain.model.experts.kinds`` of its own."""

    kind: str
    """How experts are chosen."""
    causal: ClassVar[bool] = True
    """Whether a token's experts depend on nothing that comes after it."""
    takes_bias: ClassVar[bool] = True
    """Whether a selection bias has a meaning."""

    def check(self, settings: ExpertsSettings) -> None:
        """Raises ValueError, with the reason, where the layer's other settings don't go with this one."""

    def choose(self, scores: Scores, settings: ExpertsSettings, counted: Tensor) -> Choice:
        """The slots of every token; those of tokens that don't count take no other token's place.

        Args:
            counted: [b, T] bool.
        """
        raise NotImplementedError
