"""muP, the maximal update parametrisation: hyperparameters tuned on a narrow model hold for a wide one.

Yang et al. 2022, arXiv 2203.03466 ("Tensor Programs V"), table 8, in the form for Adam of Microsoft's ``mup`` package.
With m = fan_in / fan_in of the base shape, of each tensor by itself:

=============================== =========== =================== ============= ==========================
tensor                          initial std learning rate (Adam) weight decay  in the forward pass
=============================== =========== =================== ============= ==========================
embedding                       s           lr                  wd            times ``embedding_multiplier``
gains of norms                  (1)         lr                  wd
linear layers of the blocks     s / √m      lr / m              wd m
head, untied                    s, or 0     lr                  wd            times ``output_multiplier`` / m
head, tied                      embedding's embedding's         embedding's   times ``output_multiplier`` / m
attention scores                                                              √(base d_h) / d_h for 1 / √d_h
=============================== =========== =================== ============= ==========================

At the base shape every m is 1 and the model is the standard parametrisation's, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field, model_validator

from data_pipeline.settings import Settings

from .linear.base import LAYER_NAME, layer_shapes

if TYPE_CHECKING:
    from .settings import ModelSettings


class BaseShape(Settings):
    """The widths of the model whose hyperparameters are to hold; its depth is the model's own."""

    hidden_size: int = Field(ge=1)
    """Features of a token between the blocks."""
    heads: int = Field(ge=1)
    """Query heads."""
    kv_heads: int | None = Field(default=None, ge=1)
    """Key and value heads, which matter to Muon's learning rates alone; ``null``: each serves as many query heads as in
    the model, and there is at least one."""
    head_dim: int | None = Field(default=None, ge=1)
    """Features of a head; ``null``: ``hidden_size / heads``."""
    intermediate_size: int = Field(ge=1)
    """Features inside the feed-forward layer."""

    @model_validator(mode="after")
    def _check(self) -> BaseShape:
        if self.head_dim is None and self.hidden_size % self.heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}; change one of them or give "
                "head_dim"
            )
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(
                f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}: every key-value head serves the "
                "same number of query heads"
            )
        return self


class MupSettings(Settings):
    base: BaseShape
    """The shape at which muP and the standard parametrisation are the same: the one the learning rate was tuned at."""
    embedding_multiplier: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """The embedding's output is multiplied by this at every width (alpha_in)."""
    output_multiplier: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """The logits are multiplied by this over the width of the base shape (alpha_out / m)."""
    zero_init_head: bool = False
    """The head starts at zero: the logits of the first step are then 0 at every width, where they else shrink with it.
    Differs from the standard parametrisation at the base shape too."""
    zero_init_query: bool = False
    """The query layers start at zero, and so do the attention scores; as above."""
    scale_weight_decay: bool = True
    """Multiply the weight decay by m where the learning rate is divided by it, so that their product, the share of a
    weight that a step removes, is the same at every width. ``false``: ``optimizer.weight_decay`` for every tensor."""


def check_mup(settings: ModelSettings) -> None:
    """Refuse combinations of muP's settings with others of the model that would train nothing or undo each other.

    Raises:
        ValueError: with the reason.
    """
    mup = settings.mup
    if mup is None:
        return
    if settings.experts is not None:
        raise ValueError(
            "mup with experts: how learning rates and initial values of a router, and of experts by their number and "
            "top_k, have to change with the width is confirmed nowhere. Leave out model.mup, or model.experts"
        )
    if mup.zero_init_head and settings.tied_embeddings:
        raise ValueError(
            "mup.zero_init_head with tied_embeddings would start the embedding at zero, and every hidden state with "
            "it; choose one of them"
        )
    if mup.zero_init_query and settings.qk_norm:
        raise ValueError(
            "mup.zero_init_query with qk_norm: the norm of a zero query multiplies its first gradient by 1 / "
            "sqrt(norm_eps), and gives it full size after one step; choose one of them"
        )


def base_model(settings: ModelSettings) -> ModelSettings:
    """The model at its base shape: the same but for the widths."""
    assert settings.mup is not None
    base = settings.mup.base
    in_proportion = max(1, settings.effective_kv_heads * base.heads // settings.heads)
    return settings.model_copy(
        update={
            "hidden_size": base.hidden_size,
            "heads": base.heads,
            "kv_heads": in_proportion if base.kv_heads is None else base.kv_heads,
            "head_dim": base.head_dim,
            "intermediate_size": base.intermediate_size,
        }
    )


class ForwardMultipliers(NamedTuple):
    """What the forward pass multiplies by; all 1 without muP."""

    embedding: float = 1.0
    """The embedding's output."""
    head: float = 1.0
    """The head's input, and so the logits."""
    attention: float = 1.0
    """The attention scores, besides 1 / √d_h."""


def forward_multipliers(settings: ModelSettings) -> ForwardMultipliers:
    """The multipliers of a model's forward pass."""
    if settings.mup is None:
        return ForwardMultipliers()
    return ForwardMultipliers(
        embedding=settings.mup.embedding_multiplier,
        head=settings.mup.output_multiplier / width("head", settings),
        attention=math.sqrt(base_model(settings).effective_head_dim / settings.effective_head_dim),
    )


def initial_std_factor(name: str, settings: ModelSettings) -> float:
    """What multiplies the initial standard deviation of the linear layer ``name``; 0 where it starts at zero."""
    mup = settings.mup
    if mup is None:
        return 1.0
    if (mup.zero_init_head and name == "head") or (mup.zero_init_query and name.endswith("attention.query")):
        return 0.0
    return 1.0 / math.sqrt(width(name, settings)) if name != "head" else 1.0


class WidthScaling(NamedTuple):
    """What multiplies the optimizer's settings for a tensor; all 1 without muP and at the base shape."""

    learning_rate: float = 1.0
    weight_decay: float = 1.0
    gradient: float = 1.0
    """How large the entries of its gradient are: 1 / m of the head for every tensor, as the logits are divided by it
    and all else keeps its size. Adam's eps has to keep its proportion to them."""


RateRule = Callable[[tuple[int, int], tuple[int, int]], float]
"""From the shapes [out, in] of a hidden matrix and of the same one in the base shape to the factor of its learning
rate, by what the optimizer's updates are like."""


def width_scaling(name: str, settings: ModelSettings, rate: RateRule) -> WidthScaling:
    """The factors of the parameter ``name``, as ``blocks.0.attention.query.weight``."""
    if settings.mup is None:
        return WidthScaling()
    gradient = 1.0 / width("head", settings)
    module = name.removesuffix(".weight")
    if not is_hidden(module):
        return WidthScaling(gradient=gradient)
    factor = rate(_shape(module, settings), _shape(module, base_model(settings)))
    return WidthScaling(factor, 1.0 / factor if settings.mup.scale_weight_decay else 1.0, gradient)


def is_hidden(module: str) -> bool:
    """Whether a module is a linear layer of a block: both sides of its weight grow with the width."""
    return module.startswith("blocks.") and not module.endswith("norm")


def width(module: str, settings: ModelSettings) -> float:
    """m: the inputs of a linear layer (of a block, or ``head``) over those of the base shape's."""
    return _shape(module, settings)[1] / _shape(module, base_model(settings))[1]


def _shape(module: str, settings: ModelSettings) -> tuple[int, int]:
    """[out, in] of the weight of a linear layer; of the head only what it reads grows."""
    found = LAYER_NAME.fullmatch(module)
    ins, outs = layer_shapes(settings)[found[2]] if found else (settings.hidden_size, 1)
    return outs, ins
