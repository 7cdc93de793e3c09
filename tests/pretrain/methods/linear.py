"""Parameterizations of the linear layers. The reference is the same decoder in one process; what a layer computes is
held against independent code in the tests of each parameterization."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.config import Config
from pretrain.model import Decoder
from pretrain.model.linear import layer_shapes

from . import Method


def linear(*rules: dict[str, Any]) -> Method:
    return Method({"model": {"linear": list(rules)}})


def random_masks(config: Config) -> dict[str, Tensor]:
    """Masks that keep about 40 % of every layer."""
    random = np.random.default_rng(5)
    return {
        f"blocks.{block}.{name}.mask": torch.from_numpy(random.random((outputs, inputs)) < 0.4)
        for block in range(config.model.layers)
        for name, (inputs, outputs) in layer_shapes(config.model).items()
    }


GRADUAL = {"begin_step": 0, "end_step": 2, "every_steps": 1, "initial_sparsity": 0.2}
PRUNED = (
    {"kind": "magnitude_pruned", "sparsity": 0.6, "gradual": GRADUAL, "modules": ["attention.*"]},
    {"kind": "magnitude_pruned", "sparsity": 0.6, "gradual": GRADUAL, "scope": "global", "modules": ["feed_forward.*"]},
)


def prune(model: Decoder, masters: dict[str, Tensor], step: int) -> None:
    """The masks of ``PRUNED`` by a plain sort: each attention layer by itself, all feed-forward layers together."""
    share = 0.6 - 0.4 * (1 - step / 2) ** 3
    masks = {name: buffer for name, buffer in model.named_buffers() if name.endswith(".mask")}
    together = [[name] for name in masks if "attention" in name] + [[name for name in masks if "attention" not in name]]
    for names in together:
        magnitudes = [masters[f"{name[:-4]}weight"].abs() * masks[name] for name in names]
        order = torch.cat([each.flatten() for each in magnitudes]).argsort(stable=True)
        kept = torch.ones(len(order), dtype=torch.bool)
        kept[order[: int(share * len(order) + 1e-9)]] = False
        for name, part in zip(names, kept.split([masks[name].numel() for name in names]), strict=True):
            masks[name].copy_(part.view_as(masks[name]))


METHODS = {
    "dense": linear(),
    "low_rank": linear({"kind": "low_rank", "rank": 6}),
    "cola": linear({"kind": "cola", "rank": 6}),
    "lost": linear({"kind": "lost", "rank": 6, "column_fraction": 0.1}),
    "lost without a sparse part": linear({"kind": "lost", "rank": 6, "gamma": 1.0, "activation": "identity"}),
    "column_sparse": linear({"kind": "column_sparse", "column_fraction": 0.5}),
    "sltrain": linear({"kind": "sltrain", "rank": 6, "alpha": 12.0}),
    "magnitude_pruned, fixed": Method(
        {"model": {"linear": [{"kind": "magnitude_pruned", "sparsity": 0.6, "mask_from": "random_masks"}]}},
        initial=random_masks,
    ),
    "magnitude_pruned, on the way": Method({"model": {"linear": list(PRUNED)}}, before_step=prune),
    "several": linear(
        {"kind": "lost", "rank": 6, "columns": "random", "modules": ["attention.*"]},
        {"kind": "cola", "rank": 8, "modules": ["feed_forward.*"], "layers": "1"},
    ),
}
