"""The names of a decoder's tensors, here and in transformers' Llama family."""

from __future__ import annotations

import re

_OUTSIDE = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_INSIDE = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
_OURS = re.compile(r"blocks\.(\d+)\.(.+)")
_THEIRS = re.compile(r"model\.layers\.(\d+)\.(.+)")


def their_module(name: str) -> str:
    """``blocks.0.attention.query`` -> ``model.layers.0.self_attn.q_proj``."""
    found = _OURS.fullmatch(name)
    return f"model.layers.{found[1]}.{_INSIDE[found[2]]}" if found else _OUTSIDE[name]


def our_module(name: str) -> str | None:
    """:func:`their_module` undone; None for a module that a decoder does not have."""
    found = _THEIRS.fullmatch(name)
    table = {theirs: ours for ours, theirs in (_INSIDE if found else _OUTSIDE).items()}
    ours = table.get(found[2] if found else name)
    return f"blocks.{found[1]}.{ours}" if found and ours else ours


def their_name(name: str) -> str:
    """Of a tensor: the module's name changes, the tensor's own does not."""
    module, _, own = name.rpartition(".")
    return f"{their_module(module)}.{own}"


def our_name(name: str) -> str | None:
    """:func:`their_name` undone; None for a tensor that a decoder does not have."""
    module, _, own = name.rpartition(".")
    ours = our_module(module)
    return f"{ours}.{own}" if ours else None
