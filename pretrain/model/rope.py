"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split layout of Llama checkpoints.

Features i and i + d_h/2 of a head are a pair, rotated by position * theta^(-2i/d_h).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines and sines of a batch, shared by all layers: [b, T, 1, d_h], both halves alike."""

    cosine: Tensor
    sine: Tensor


def rotation(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """The rotation of every token. ``positions`` [b, T] are integers; angles are made in fp32 and cast at the end.

    Nothing is kept between batches: a buffer would be lost when a model made on the meta device is materialised.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[..., None, None].float() * theta**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """``x`` [b, T, heads, d_h], each pair of features rotated by its token's angles."""
    first, second = x.chunk(2, dim=-1)
    return x * by.cosine + torch.cat((-second, first), dim=-1) * by.sine
