"""The ``model.experts`` section of a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from data_pipeline.settings import Settings
from pretrain.methods import choice_of

from .entropy import EntropySettings
from .kinds.top_k import TopKSettings
from .routing import RoutingSettings

if TYPE_CHECKING:
    Routing = RoutingSettings
else:
    Routing = choice_of("pretrain.model.experts.kinds", RoutingSettings)


class GroupSettings(Settings):
    """Experts in groups of neighbours, of which a token uses only a few (DeepSeek-V2 and V3)."""

    number: int = Field(ge=2)
    """Groups; divides the number of experts."""
    kept: int = Field(ge=1)
    """Groups that a token may use: those of the largest group scores."""
    best: int = Field(default=2, ge=1)
    """A group's score is the sum of so many of its largest: 2 in DeepSeek-V3, 1 in V2."""


class CapacitySettings(Settings):
    """A bound on the slots of an expert; what is beyond it is dropped and counted."""

    factor: float = Field(gt=0.0, allow_inf_nan=False)
    """An expert takes at most ⌈factor k T / E⌉ slots of a sequence of T tokens; 1 is just enough for a balanced one."""
    priority: Literal["position", "score"] = "position"
    """Who stays: ``position``, the earlier tokens, of earlier documents in the row too; ``score``, those of the larger
    weight, which makes a token's experts depend on tokens after it."""


class ExpertsSettings(Settings):
    """Mixtures of experts in place of the feed-forward layers of blocks."""

    number: int = Field(ge=1)
    """Routed experts of a block (E)."""
    top_k: int = Field(ge=1)
    """Experts that a token goes to (k)."""
    intermediate_size: int = Field(ge=1)
    """Features inside each expert."""
    shared: int = Field(default=0, ge=0)
    """Experts that every token goes to besides; made as one feed-forward layer of ``shared`` times the size."""
    dense_first: int = Field(default=0, ge=0)
    """The first blocks keep a feed-forward layer of ``model.intermediate_size``."""
    every: int = Field(default=1, ge=1)
    """Of the blocks after these, every so many-th has experts, the first of them included."""
    routing: Routing = TopKSettings()
    """How experts are chosen: a ``kind``, or a mapping with it and its settings."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """What the router makes of its logits, in fp32: shares of all experts, or of each by itself (DeepSeek-V3)."""
    normalised: bool = True
    """The weights of a token's experts are made to sum to 1 (Mixtral, Qwen3, DeepSeek-V3; not OLMoE)."""
    scaling: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """What multiplies the weights of the routed experts (DeepSeek-V3's, unconfirmed, is 2.5)."""
    jitter: float = Field(default=0.0, ge=0.0, lt=1.0)
    """In training, the router's input features are multiplied by numbers from 1 - jitter to 1 + jitter (Switch: 0.01),
    fixed by seed, position in the run, block, token and feature."""
    groups: GroupSettings | None = None
    """Bound a token to a few groups of experts; ``null``: to none."""
    capacity: CapacitySettings | None = None
    """Bound the slots of an expert, in training; ``null``: dropless. An evaluation drops nothing."""
    selection_bias: bool = False
    """Every router has a number for each expert, 0 at the start, that is added to the scores where experts are chosen
    and nowhere else (DeepSeek-V3); ``objective.balancing.bias`` moves them. Part of every checkpoint, in fp32."""
    entropy: EntropySettings | None = None
    """The entropy of hybrid routing and of the entropy loss; ``null``: neither."""

    @model_validator(mode="after")
    def _check(self) -> ExpertsSettings:
        if self.top_k > self.number:
            raise ValueError(f"top_k {self.top_k} is more than number {self.number}; a token can't go to more experts")
        if self.normalised and self.top_k == 1 and self.routing.kind == "top_k":
            raise ValueError(
                "normalised with top_k 1 gives every token's expert the weight 1 whatever the router says, so that no "
                "loss of the model's output would train it; set normalised=false"
            )
        if self.groups is not None:
            if self.number % self.groups.number:
                raise ValueError(f"number {self.number} is not a multiple of groups.number {self.groups.number}")
            if self.groups.kept >= self.groups.number:
                raise ValueError(
                    f"groups.kept {self.groups.kept} of {self.groups.number} groups bounds nothing; leave groups out"
                )
            reach = self.groups.kept * self.number // self.groups.number
            if reach < self.top_k:
                raise ValueError(f"groups.kept {self.groups.kept} have {reach} experts, fewer than top_k {self.top_k}")
        if self.selection_bias and not self.routing.takes_bias:
            raise ValueError(f"selection_bias has no meaning with routing {self.routing.kind}; leave it out")
        self.routing.check(self)
        return self

    def in_block(self, layer: int) -> bool:
        """Whether block ``layer`` (from 0) has experts."""
        return layer >= self.dense_first and (layer - self.dense_first) % self.every == 0
