"""Random numbers as a function of where they are used, the same on any device and in any pass (router jitter)."""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: the odd number next to 2^64 / golden ratio
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB


def noise_keys(seed: int, positions: Tensor) -> Tensor:
    """A key for each sequence, [b] int64, from the run's seed and the sequences' positions in the run."""
    salt = int.from_bytes(blake2b(f"{seed}/router noise".encode(), digest_size=8).digest(), "little", signed=True)
    return mixed(positions + salt)


def uniform(keys: Tensor, layer: int, length: int, width: int) -> Tensor:
    """Numbers in [0, 1), [b, length, width] fp32: splitmix64 (Steele et al. 2014) of key, layer, place and feature."""

    def count(size: int) -> Tensor:
        return torch.arange(1, size + 1, device=keys.device) * _GOLDEN

    by_token = mixed(mixed(keys + (layer + 1) * 2_654_435_761)[:, None] + count(length))
    bits = mixed(by_token[..., None] + count(width))
    return (bits >> 40 & 0xFFFFFF).float() * 2.0**-24


def mixed(x: Tensor) -> Tensor:
    """The finaliser of splitmix64; int64 products wrap as unsigned ones do, shifts have to be made logical."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _FIRST
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _SECOND
    return x ^ (x >> 31 & (1 << 33) - 1)
