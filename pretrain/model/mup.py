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
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from pydantic import Field, model_validator

from data_pipeline.settings import Settings

if TYPE_CHECKING:
    from .settings import ModelSettings


class BaseShape(Settings):
    """The widths of the model whose hyperparameters are to hold; its depth is the model's own."""

    hidden_size: int = Field(ge=1)
    """Features of a token between the blocks."""
    heads: int = Field(ge=1)
    """Query heads."""
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
        return self

    @property
    def effective_head_dim(self) -> int:
        return self.hidden_size // self.heads if self.head_dim is None else self.head_dim


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


class _Widths(Protocol):
    """What a :class:`BaseShape` and a ``ModelSettings`` both say."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def effective_head_dim(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...


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
        attention=math.sqrt(settings.mup.base.effective_head_dim / settings.effective_head_dim),
    )


class WidthScaling(NamedTuple):
    """What multiplies a tensor's settings; all 1 without muP and at the base shape."""

    init_std: float = 1.0
    learning_rate: float = 1.0
    weight_decay: float = 1.0
    gradient: float = 1.0
    """How large the entries of its gradient are: 1 / m of the head for every tensor, as logits are divided by it and
    all else keeps its size. Adam's eps has to keep its proportion to them."""


def width_scaling(name: str, settings: ModelSettings) -> WidthScaling:
    """The factors of the parameter ``name``, as ``blocks.0.attention.query.weight``, under Adam or AdamW."""
    if settings.mup is None:
        return WidthScaling()
    gradient = 1.0 / width("head", settings)
    if kind_of(name) != "hidden":
        # the head's entries stay at sigma at every width, and so does the size of its zero-initialised start
        return WidthScaling(gradient=gradient)
    m = width(name, settings)
    return WidthScaling(1.0 / math.sqrt(m), 1.0 / m, m if settings.mup.scale_weight_decay else 1.0, gradient)


def initial_std_factor(name: str, settings: ModelSettings) -> float:
    """What multiplies the initial standard deviation of the linear layer ``name``; 0 where it starts at zero."""
    mup = settings.mup
    if mup and ((mup.zero_init_head and name == "head") or (mup.zero_init_query and name.endswith("attention.query"))):
        return 0.0
    return width_scaling(name, settings).init_std


def kind_of(name: str) -> Literal["embedding", "gain", "hidden", "head"]:
    """Which row of the table the parameter ``name`` belongs to."""
    owner = name.removesuffix(".weight").rpartition(".")[2]
    if owner in ("embedding", "head"):
        return "embedding" if owner == "embedding" else "head"
    return "gain" if owner.endswith("norm") else "hidden"


def width(name: str, settings: ModelSettings) -> float:
    """m: the inputs of the linear layer ``name`` (of a block, or ``head``) over those of the base shape's."""
    assert settings.mup is not None
    return _fan_in(name, settings) / _fan_in(name, settings.mup.base)


def _fan_in(name: str, shape: _Widths) -> int:
    module = name.removesuffix(".weight")
    if module.endswith("attention.output"):
        return shape.heads * shape.effective_head_dim
    return shape.intermediate_size if module.endswith("feed_forward.down") else shape.hidden_size
