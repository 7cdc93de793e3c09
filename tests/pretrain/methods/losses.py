"""Losses other than cross-entropy. The reference differentiates them over all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import Method


def z_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Of the Z-loss with a = 0.5 and b = 3, by its definition."""
    chosen = logits.gather(1, labels[:, None])[:, 0]
    z = (chosen - logits.mean(1)) / logits.var(1, correction=0).sqrt()
    return torch.log1p(torch.exp(0.5 * (3 - z))) / 0.5


def spherical_z(model: dict[str, Any] | None = None, **objective: Any) -> Method:
    loss = {"kind": "spherical_z", "a": 0.5, "b": 3.0}
    return Method({"objective": {"loss": loss, **objective}, "model": model or {}}, token_losses=z_losses)


METHODS = {
    "spherical_z": spherical_z(),
    "spherical_z, tied": spherical_z({"tied_embeddings": True}),
    "spherical_z, weighed": spherical_z(
        average="sequence", reweighting={"strategy": "linupper", "temperature": 0.4, "group": "global_batch_one_pass"}
    ),
}
