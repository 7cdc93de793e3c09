"""One linear layer by itself, made by its settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.settings import build_settings
from pretrain.model import ModelSettings, initialize_
from pretrain.model.linear import LinearSettings

SHAPES = [(40, 24), (24, 40), (32, 32)]
"""(in_features, out_features): wide, tall, square."""
STD = 0.05


def rule(width: int = 32, **content: Any) -> LinearSettings:
    """The settings of one rule of ``model.linear``, in a model of this width."""
    shape = {"hidden_size": width, "layers": 1, "heads": 1, "intermediate_size": width}
    return build_settings(ModelSettings, {**shape, "linear": [content]}, "test").linear[0]


def layer(shape: tuple[int, int], seed: int = 3, std: float = STD, **content: Any) -> nn.Module:
    """The layer, with the initial values of ``seed``."""
    made = rule(max(shape), **content).make(*shape, std)
    initialize_(nn.ModuleDict({"layer": made}), seed)
    return made


def inputs(shape: tuple[int, int], rows: int = 5) -> Tensor:
    """[2, rows, in_features], of which a gradient may be asked."""
    return torch.randn(2, rows, shape[0], generator=torch.Generator().manual_seed(11)).requires_grad_()
