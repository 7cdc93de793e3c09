"""The classes of transformers that compute what a decoder does, and what each of them can't say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from data_pipeline.errors import UserError
from pretrain.model import ModelSettings
from pretrain.model.experts.settings import ExpertsSettings

from .names import LayoutName

CUSTOM = "headrace_"
"""Prefix of ``model_type`` where ``modeling_headrace.py`` is needed: transformers must not take its own class then."""


@dataclass(frozen=True)
class Layout:
    """A class of transformers, ``{name}ForCausalLM``."""

    name: str
    qk_norm: bool | Literal["all_heads"] = False
    """What its models have of ``model.qk_norm``."""
    experts: bool = False
    even_heads: bool = False
    """``hidden_size`` is a multiple of ``heads``."""
    own_head_dim: bool = True
    """A head's size need not be ``hidden_size / heads``."""
    dense_blocks: bool = True
    """Of a model with experts some blocks may have none."""
    shared: bool = False
    """Every block with experts has a shared one."""
    always_normalised: bool = False
    """The weights of a token's experts sum to 1."""


LAYOUTS: dict[LayoutName, Layout] = {
    "llama": Layout("Llama", even_heads=True),
    "mistral": Layout("Mistral"),
    "qwen3": Layout("Qwen3", qk_norm=True),
    "mixtral": Layout("Mixtral", experts=True, dense_blocks=False, always_normalised=True),
    "olmoe": Layout(
        "Olmoe", qk_norm="all_heads", experts=True, even_heads=True, own_head_dim=False, dense_blocks=False
    ),
    "qwen2_moe": Layout("Qwen2Moe", experts=True, shared=True),
    "qwen3_moe": Layout("Qwen3Moe", qk_norm=True, experts=True),
}
"""By ``model_type``. Qwen3 is Llama with the norm of query and key heads; Mistral without its window is Llama whose
``hidden_size`` need not be a multiple of the heads; the others are these with experts."""


def choose_layout(settings: ModelSettings, asked: LayoutName | None = None) -> LayoutName:
    """The layout that ``asked`` names, else the first that can say what ``settings`` do.

    Raises:
        UserError: it can't, or none can: says which settings are why.
    """
    candidates = [asked] if asked else [name for name in LAYOUTS if LAYOUTS[name].experts == bool(settings.experts)]
    found = {name: list(unsaid(settings, LAYOUTS[name])) for name in candidates}
    for name, reasons in found.items():
        if not reasons:
            return name
    told = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in found.items())
    which = "the layout that was asked for" if asked else "any layout of transformers"
    raise UserError(f"the model can't be exported in {which}. {told}.")


def unsaid(settings: ModelSettings, layout: Layout) -> Iterator[str]:
    """What of a decoder ``layout`` has no words for, each naming the setting."""
    if settings.qk_norm != layout.qk_norm:
        yield f"model.qk_norm is {_yaml(settings.qk_norm)}, there it is {_yaml(layout.qk_norm)}"
    if layout.even_heads and settings.hidden_size % settings.heads:
        yield f"model.hidden_size {settings.hidden_size} is not a multiple of model.heads {settings.heads}"
    if not layout.own_head_dim and settings.effective_head_dim * settings.heads != settings.hidden_size:
        yield f"model.head_dim is {settings.effective_head_dim}, there it is hidden_size / heads"
    if bool(settings.experts) != layout.experts:
        yield f"model.experts is {'given, and it has none' if settings.experts else 'null, and it has them'}"
    elif settings.experts:
        dense = [layer for layer in range(settings.layers) if not settings.has_experts(layer)]
        if dense and not layout.dense_blocks:
            yield f"block {dense[0]} has no experts (model.experts.dense_first, every), there all blocks have"
        yield from _unsaid_of_experts(settings.experts, layout)


def _unsaid_of_experts(experts: ExpertsSettings, layout: Layout) -> Iterator[str]:
    if layout.always_normalised and not experts.normalised:
        yield "model.experts.normalised is false, there a token's weights sum to 1"
    if bool(experts.shared) != layout.shared:
        yield f"model.experts.shared is {experts.shared}, there {'an' if layout.shared else 'no'} expert is shared"
    if experts.score != "softmax":
        yield f"model.experts.score is {experts.score}, there it is softmax"
    if experts.groups is not None:
        yield "model.experts.groups bound a token to groups of experts, there it may use any"
    if experts.routing.kind != "top_k":
        yield f"model.experts.routing is {experts.routing.kind}, there it is top_k"


def _yaml(value: bool | str) -> str:
    return str(value).lower()
