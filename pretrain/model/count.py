"""Parameters and arithmetic of a model, from its settings alone: built on the meta device, nothing is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .decoder import Decoder
from .linear import LinearCost, LinearSettings, block_shapes, method_of
from .settings import ModelSettings


class ParameterCount(NamedTuple):
    total: int
    """All parameters; a tied weight counts once."""
    non_embedding: int
    """Without the embedding and the head: what scaling laws mean by N (Kaplan et al. 2020, arXiv 2001.08361)."""
    multiplied: int
    """Multiplications of a token by weights: in linear layers and head, tied or not; not in the embedding's look-up,
    nor by the norms' gains. Of dense layers it is the number of their weights."""


class LinearLayer(NamedTuple):
    """One linear layer of a block."""

    name: str
    """In the decoder, as ``blocks.0.attention.query``."""
    method: LinearSettings
    cost: LinearCost


def linear_layers(settings: ModelSettings) -> Iterator[LinearLayer]:
    """The linear layers of all blocks, block by block."""
    for layer in range(settings.layers):
        for inside, (in_features, out_features) in block_shapes(settings).items():
            name = f"blocks.{layer}.{inside}"
            method = method_of(name, settings)
            yield LinearLayer(name, method, method.cost(in_features, out_features))


def parameter_shapes(settings: ModelSettings, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the decoder, by name; a tied head is the embedding and not named."""
    with torch.device("meta"):
        model = Decoder(settings, vocab_size)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def count_parameters(settings: ModelSettings, vocab_size: int) -> ParameterCount:
    """The parameter counts of the decoder of this shape."""
    with torch.device("meta"):
        model = Decoder(settings, vocab_size)
    head = sum(parameter.numel() for parameter in model.head.parameters() if parameter.ndim > 1)
    return ParameterCount(
        total=sum(parameter.numel() for parameter in model.parameters()),
        non_embedding=sum(parameter.numel() for parameter in (*model.blocks.parameters(), *model.norm.parameters())),
        multiplied=sum(layer.cost.multiplied for layer in linear_layers(settings)) + head,
    )


def flops_per_token(settings: ModelSettings, vocab_size: int, seq_len: int) -> int:
    """Floating-point operations of a training step for each token, forward and backward: 6 N + 12 L H d_h T.

    PaLM (Chowdhery et al. 2022, arXiv 2204.02311), appendix B: each of the N ``multiplied`` weights costs a multiply
    and an add in the forward pass and twice that in the backward pass; scores and mixing of attention cost the second
    term for ``seq_len`` T, counted in full though the causal mask makes half of it unnecessary, as is the convention
    for MFU. What activation checkpointing recomputes is not counted (that would be HFU).
    """
    attention = 12 * settings.layers * settings.heads * settings.effective_head_dim * seq_len
    return 6 * count_parameters(settings, vocab_size).multiplied + attention
