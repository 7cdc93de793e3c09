"""Parameters and arithmetic of a model, from its settings alone: built on the meta device, nothing is allocated."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .decoder import Decoder
from .settings import ModelSettings


class ParameterCount(NamedTuple):
    total: int
    """All parameters; a tied weight counts once."""
    non_embedding: int
    """Without the embedding and the head: what scaling laws mean by N (Kaplan et al. 2020, arXiv 2001.08361)."""
    multiplied: int
    """Weights that every token is multiplied with: linear layers and head, tied or not; not the embedding's look-up,
    not the norms' gains."""


def count_parameters(settings: ModelSettings, vocab_size: int) -> ParameterCount:
    """The parameter counts of the decoder of this shape."""
    with torch.device("meta"):
        model = Decoder(settings, vocab_size)
    total = sum(parameter.numel() for parameter in model.parameters())
    blocks = [*model.blocks.parameters(), *model.norm.parameters()]
    matrices = [parameter for parameter in (*blocks, *model.head.parameters()) if parameter.ndim > 1]
    return ParameterCount(
        total=total,
        non_embedding=sum(parameter.numel() for parameter in blocks),
        multiplied=sum(parameter.numel() for parameter in matrices),
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
