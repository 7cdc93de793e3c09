"""The states of the random number generators of one rank, for a resume to the same bits."""

from __future__ import annotations

import random
from hashlib import blake2b
from typing import Any

import numpy as np
import torch


def seed_generators(seed: int, rank: int) -> None:
    """Start every generator of this process from (seed, rank). Nothing of Headrace draws from them; what a user adds
    may."""
    digest = blake2b(f"{seed}/rank {rank}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "little")
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def random_states() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's generators (and the GPU's where there is one)."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Put back what :func:`random_states` took."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
