"""The names of a decoder's tensors, here and in transformers' Llama family.

A block's experts are three stacks here and three matrices each in the files of transformers.
"""

from __future__ import annotations

import re
from typing import Literal

LayoutName = Literal["llama", "mistral", "qwen3", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"]
"""``model_type`` of what is written and read; :mod:`.layouts` says what each can hold."""

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
    "feed_forward.router": "mlp.gate",
    "feed_forward.shared.gate": "mlp.shared_expert.gate_proj",
    "feed_forward.shared.up": "mlp.shared_expert.up_proj",
    "feed_forward.shared.down": "mlp.shared_expert.down_proj",
}
SHARED_GATE = "mlp.shared_expert_gate.weight"
"""Of a block of Qwen2-MoE, [1, d]: sigmoid(gate x) multiplies what the shared expert gives. At 0 it is 1/2, so that
twice the weights of :data:`SHARED_DOWN` are an expert that every token goes to in full."""
SHARED_DOWN = "feed_forward.shared.down"
_MIXTRAL = "block_sparse_moe"
"""What Mixtral's files call ``mlp``."""
_PARTS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_MIXTRAL_PARTS = {"gate": "w1", "up": "w3", "down": "w2"}
_STACK = re.compile(r"(blocks\.\d+)\.feed_forward\.experts\.(gate|up|down)")
_EXPERT = re.compile(rf"model\.layers\.(\d+)\.(?:mlp|{_MIXTRAL})\.experts\.(\d+)\.(\w+)\.weight")
_OURS = re.compile(r"blocks\.(\d+)\.(.+)")
_THEIRS = re.compile(r"model\.layers\.(\d+)\.(.+)")


def their_module(name: str) -> str:
    """``blocks.0.attention.query`` -> ``model.layers.0.self_attn.q_proj``."""
    found = _OURS.fullmatch(name)
    return f"model.layers.{found[1]}.{_INSIDE[found[2]]}" if found else _OUTSIDE[name]


def our_module(name: str) -> str | None:
    """:func:`their_module` undone; None for a module that a decoder does not have."""
    name = name.replace(f".{_MIXTRAL}.", ".mlp.")
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


def is_stack(name: str) -> bool:
    """Whether ``name`` is of a block's experts together, as ``blocks.0.feed_forward.experts.gate``."""
    return _STACK.fullmatch(name) is not None


def their_expert(stack: str, number: int, layout: LayoutName) -> str:
    """Of one matrix of a stack, in the files of ``layout``: ``...mlp.experts.3.gate_proj.weight``, or Mixtral's."""
    found = _STACK.fullmatch(stack)
    assert found is not None
    mixtral = layout == "mixtral"
    module = f"model.layers.{found[1].removeprefix('blocks.')}.{_MIXTRAL if mixtral else 'mlp'}"
    return f"{module}.experts.{number}.{(_MIXTRAL_PARTS if mixtral else _PARTS)[found[2]]}.weight"


def our_expert(name: str) -> tuple[str, int] | None:
    """:func:`their_expert` undone: the stack and the number in it; None for what is no expert's matrix."""
    found = _EXPERT.fullmatch(name)
    parts = {theirs: ours for table in (_PARTS, _MIXTRAL_PARTS) for ours, theirs in table.items()}
    if found is None or found[3] not in parts:
        return None
    return f"blocks.{found[1]}.feed_forward.experts.{parts[found[3]]}", int(found[2])


def in_files_of(layout: LayoutName, name: str) -> str:
    """A tensor's name as the files of ``layout`` have it: Mixtral's router lies in another module."""
    return name.replace(".mlp.gate.", f".{_MIXTRAL}.gate.") if layout == "mixtral" else name
