"""The one place where a linear layer is made.

Attention, feed-forward and head ask :func:`make_linear` by name and know nothing of how the layer keeps its weight.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from .initialize import Draw
from .settings import ModelSettings

RESIDUAL_WRITERS = ("attention.output", "feed_forward.down")
"""Ends of the names of the linear layers whose output is added to the residual stream: two in each block."""


class DenseLinear(nn.Linear):
    """y = x Wᵀ: x [..., in_features], W [out_features, in_features], no bias."""

    def __init__(self, in_features: int, out_features: int, init_std: float) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.init_std = init_std

    def reset_parameters(self) -> None:
        """Draws nothing: weights come from :mod:`.initialize`."""

    def initial_value(self, parameter: str, draw: Draw) -> Tensor:
        return draw(parameter, (self.out_features, self.in_features), self.init_std)


def initial_std(name: str, settings: ModelSettings) -> float:
    """Standard deviation of the initial weight of the linear layer ``name``.

    The layers that write into the residual stream get 1/sqrt(2 L) of the others' (GPT-2, section 2.3), so that the
    variance of the stream after 2 L additions does not grow with the depth.
    """
    scaled = settings.init_scaled_residual and name.endswith(RESIDUAL_WRITERS)
    return settings.init_std / math.sqrt(2 * settings.layers) if scaled else settings.init_std


def make_linear(in_features: int, out_features: int, name: str, settings: ModelSettings) -> nn.Module:
    """A linear layer without bias, [..., in_features] -> [..., out_features].

    Args:
        name: the module's full name in the decoder, for example ``blocks.0.attention.query``: what a choice for some
            of the layers can go by.
    """
    return DenseLinear(in_features, out_features, initial_std(name, settings))
