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
    active: int
    """All but those of the routed experts that a token does not go to, of its ``top_k`` each."""
    multiplied: int
    """Multiplications of a token by weights: in linear layers, routers, the experts that it goes to, and head, tied or
    not; not in the embedding's look-up, nor by the norms' gains. Of dense layers it is the number of their weights."""


class MixtureCount(NamedTuple):
    """The routed experts of one block, and their router."""

    experts: int
    """Parameters of all of them."""
    active: int
    """Of ``top_k`` of them: what a token is multiplied by. Hybrid routing sends undecided tokens to more."""
    router: int
    """Parameters of the router, all of which a token is multiplied by."""
    bias_bytes: int
    """Of its selection bias, in fp32 at every precision."""


class LinearLayer(NamedTuple):
    """One linear layer of a block."""

    name: str
    """In the decoder, as ``blocks.0.attention.query``."""
    method: LinearSettings
    cost: LinearCost


def linear_layers(settings: ModelSettings) -> Iterator[LinearLayer]:
    """The linear layers of all blocks, block by block."""
    for layer in range(settings.layers):
        for inside, (in_features, out_features) in block_shapes(settings, layer).items():
            name = f"blocks.{layer}.{inside}"
            method = method_of(name, settings)
            yield LinearLayer(name, method, method.cost(in_features, out_features))


def mixture_count(settings: ModelSettings) -> MixtureCount:
    """Of a block with experts; all 0 for a model without."""
    mixture = settings.experts
    if mixture is None:
        return MixtureCount(0, 0, 0, 0)
    of_expert = 3 * settings.hidden_size * mixture.intermediate_size
    return MixtureCount(
        experts=mixture.number * of_expert,
        active=mixture.top_k * of_expert,
        router=mixture.number * settings.hidden_size,
        bias_bytes=4 * mixture.number if mixture.selection_bias else 0,
    )


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
    mixture, mixtures = mixture_count(settings), len(settings.expert_layers)
    total = sum(parameter.numel() for parameter in model.parameters())
    layers = sum(layer.cost.multiplied for layer in linear_layers(settings))
    return ParameterCount(
        total=total,
        active=total - mixtures * (mixture.experts - mixture.active),
        non_embedding=sum(parameter.numel() for parameter in (*model.blocks.parameters(), *model.norm.parameters())),
        multiplied=layers + mixtures * (mixture.active + mixture.router) + head,
    )


def flops_per_token(settings: ModelSettings, vocab_size: int, seq_len: int, from_moments: bool = False) -> int:
    """Floating-point operations of a training step for each token, forward and backward: 6 N + 12 L H d_h T.

    PaLM (Chowdhery et al. 2022, arXiv 2204.02311), appendix B: each of the N ``multiplied`` weights costs a multiply
    and an add in the forward pass and twice that in the backward pass; scores and mixing of attention cost the second
    term for ``seq_len`` T, counted in full though the causal mask makes half of it unnecessary, as is the convention
    for MFU. What activation checkpointing recomputes is not counted (that would be HFU).

    Args:
        from_moments: the loss takes the logits' moments: d x d in place of the head's V x d for each token. What is
            done once an optimizer step, :func:`moment_flops_per_step`, is not counted.
    """
    attention = 12 * settings.layers * settings.heads * settings.effective_head_dim * seq_len
    multiplied = count_parameters(settings, vocab_size).multiplied
    if from_moments:
        multiplied += settings.hidden_size * (settings.hidden_size - vocab_size)
    return 6 * multiplied + attention


def moment_flops_per_step(settings: ModelSettings, vocab_size: int) -> int:
    """Of the moments of the logits, once an optimizer step on every rank, however many tokens it has: the covariance of
    the head's rows, and the dense part of the head's gradient (:mod:`.linear.head`)."""
    return 4 * vocab_size * settings.hidden_size**2
