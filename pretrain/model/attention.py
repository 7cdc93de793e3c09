"""Causal self-attention within documents: rotary positions, grouped key-value heads, optional QK-norm."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import make_linear
from .mup import forward_multipliers
from .norm import RMSNorm
from .rope import Rotation, rotate
from .settings import ModelSettings


def document_mask(document_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the attention scores: 0 where a token may look, -inf elsewhere; [b, 1, T, T] (query, key).

    A token sees itself and the earlier tokens of its own document; ``document_ids`` [b, T] differ between documents.
    Made once for a batch: given a boolean mask instead, torch's kernels convert it to this form in every layer, and
    the backward pass keeps each of the copies.
    """
    length = document_ids.shape[1]
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    visible = same & torch.ones(length, length, dtype=torch.bool, device=same.device).tril()
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, float("-inf"))


class Attention(nn.Module):
    """Multi-head attention with ``kv_heads`` <= ``heads`` key-value heads (GQA, arXiv 2305.13245)."""

    def __init__(self, name: str, settings: ModelSettings) -> None:
        super().__init__()
        self.head_dim = settings.effective_head_dim
        query_size = settings.heads * self.head_dim
        key_size = settings.effective_kv_heads * self.head_dim
        self.groups = settings.heads // settings.effective_kv_heads
        self.query = make_linear(settings.hidden_size, query_size, f"{name}.query", settings)
        self.key = make_linear(settings.hidden_size, key_size, f"{name}.key", settings)
        self.value = make_linear(settings.hidden_size, key_size, f"{name}.value", settings)
        self.output = make_linear(query_size, settings.hidden_size, f"{name}.output", settings)
        multiplier = forward_multipliers(settings).attention
        # None is 1 / sqrt(head_dim) as torch rounds it
        self.scale = None if multiplier == 1.0 else multiplier / math.sqrt(self.head_dim)
        self.qk_norm = settings.qk_norm
        if self.qk_norm:
            sizes = (query_size, key_size) if self.qk_norm == "all_heads" else (self.head_dim, self.head_dim)
            self.query_norm, self.key_norm = (RMSNorm(size, settings.norm_eps) for size in sizes)

    def forward(self, x: Tensor, by: Rotation, mask: Tensor | None) -> Tensor:
        """``x`` [b, T, d] -> [b, T, d]. ``mask`` is :func:`document_mask`'s, or None: one document, plainly causal."""
        batch, length, _ = x.shape
        query, key = self.query(x), self.key(x)
        if self.qk_norm == "all_heads":
            query, key = self.query_norm(query), self.key_norm(key)
        query = query.view(batch, length, -1, self.head_dim)
        key = key.view(batch, length, -1, self.head_dim)
        value = self.value(x).view(batch, length, -1, self.head_dim)
        if self.qk_norm is True:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotate(query, by), rotate(key, by)
        if self.groups > 1 and mask is not None:
            # of CUDA's fused kernels, the one that takes a mask wants as many key-value heads as query heads; asked
            # for enable_gqa it would silently give way to the unfused one
            key, value = (t.repeat_interleave(self.groups, dim=2) for t in (key, value))
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=self.groups > 1 and mask is None,
        )
        output: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, length, -1))
        return output
