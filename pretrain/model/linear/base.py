"""What a parameterization of a linear layer is: settings that can make the layer and say what it costs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field, field_validator, model_validator
from torch import nn

from data_pipeline.settings import Settings

from .terms import Term

if TYPE_CHECKING:
    from ..settings import ModelSettings


class LinearCost(NamedTuple):
    """What one layer costs, by arithmetic; all counts are of elements."""

    parameters: int
    """Trained values."""
    multiplied: int
    """Multiplications of a token's forward pass; the backward pass has twice as many."""
    activations: int
    """Values of a token kept for the backward pass besides the layer's input, which other layers share."""
    buffer_bytes: int = 0
    """Bytes of what is kept but not trained: indices and masks; whole on every rank at any ZeRO stage."""
    products: int = 0
    """Of the ``activations``, those that ``training.activation_checkpointing: low_rank`` keeps: made by
    :func:`~pretrain.model.recompute.first_product`."""
    keeps_input: bool = True
    """Whether the layer's whole input is kept for the backward pass."""


class LinearSettings(Settings):
    """Base of the parameterizations; each lives in a module of ``pretrain.model.linear.kinds`` of its own.

    A layer maps [..., in_features] to [..., out_features] without bias, and is an
    :class:`~pretrain.model.initialize.Initializable`.
    """

    kind: str
    """Which parameterization."""
    modules: tuple[str, ...] = ("attention.*", "feed_forward.*")
    """Shell patterns of names inside a block, as ``attention.query`` or ``feed_forward.*``: the layers it is for."""
    layers: Annotated[str, Field(pattern=r"^\d+(-\d+)?$")] | None = None
    """Blocks, from 0: ``3``, or ``0-7`` with both ends; ``null``: all."""

    @field_validator("layers", mode="before")
    @classmethod
    def _one_block(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value  # what YAML makes of a single block

    @model_validator(mode="after")
    def _check_layers(self) -> LinearSettings:
        first, last = self.layer_range or (0, 0)
        if first > last:
            raise ValueError(f"layers {self.layers!r} ends before it begins; write the smaller number first")
        return self

    @property
    def layer_range(self) -> tuple[int, int] | None:
        """First and last block; None: all."""
        if self.layers is None:
            return None
        first, _, last = self.layers.partition("-")
        return int(first), int(last or first)

    def check(self, in_features: int, out_features: int) -> None:
        """Raises ValueError, with the reason, where a layer of this shape can't be made."""

    def check_steps(self, first: int, total: int) -> None:
        """Raises ValueError where something is to change before step ``first`` or after the run's ``total`` steps."""

    def make(self, in_features: int, out_features: int, init_std: float) -> nn.Module:
        """The layer; ``init_std`` is the standard deviation of the weight that a dense layer would start with."""
        raise NotImplementedError

    def cost(self, in_features: int, out_features: int) -> LinearCost:
        """What a layer of this shape costs."""
        raise NotImplementedError

    def terms(self) -> tuple[Term, ...]:
        """What a layer computes, for export and for weights from elsewhere."""
        raise NotImplementedError


LAYER_NAME = re.compile(r"blocks\.(\d+)\.(.+)")


def layer_shapes(settings: ModelSettings) -> dict[str, tuple[int, int]]:
    """The linear layers that blocks may have: name in the block to (in_features, out_features)."""
    return {name: shape for layer in range(settings.layers) for name, shape in block_shapes(settings, layer).items()}


def block_shapes(settings: ModelSettings, layer: int) -> dict[str, tuple[int, int]]:
    """The linear layers of one block: name in the block to (in_features, out_features). Routed experts and their router
    are none: their weights are no single matrix, or not chosen by ``model.linear``."""
    hidden = settings.hidden_size
    queries = settings.heads * settings.effective_head_dim
    keys = settings.effective_kv_heads * settings.effective_head_dim
    attention = {
        "attention.query": (hidden, queries),
        "attention.key": (hidden, keys),
        "attention.value": (hidden, keys),
        "attention.output": (queries, hidden),
    }
    name, inner = "feed_forward", settings.intermediate_size
    if settings.has_experts(layer):
        assert settings.experts is not None
        if not settings.experts.shared:
            return attention
        name, inner = "feed_forward.shared", settings.experts.shared * settings.experts.intermediate_size
    return {
        **attention,
        f"{name}.gate": (hidden, inner),
        f"{name}.up": (hidden, inner),
        f"{name}.down": (inner, hidden),
    }
