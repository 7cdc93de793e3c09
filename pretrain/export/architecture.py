"""config.json: the shape of a decoder as transformers says it, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.settings import build_settings
from pretrain.model import ModelSettings

from .layouts import CUSTOM, LAYOUTS
from .names import LayoutName


def to_config(settings: ModelSettings, layout: LayoutName, vocab_size: int, context: int, dtype: str) -> dict[str, Any]:
    """config.json of a decoder, without what its tokenizer says.

    Args:
        settings: the shape.
        layout: one that can say it.
        vocab_size: rows of the embedding.
        context: tokens of a training sequence: the longest that the model has seen.
        dtype: of the tensors, by torch's name.
    """
    own: dict[str, dict[str, Any]] = {
        "llama": {"attention_bias": False, "mlp_bias": False},
        "mistral": {"sliding_window": None},
        "qwen3": {"attention_bias": False, "use_sliding_window": False, "sliding_window": None},
        "mixtral": {"sliding_window": None},
        "olmoe": {"attention_bias": False, "clip_qkv": None},
        "qwen2_moe": {"qkv_bias": False, "use_sliding_window": False, "sliding_window": None},
        "qwen3_moe": {"attention_bias": False, "use_sliding_window": False, "sliding_window": None},
    }
    return {
        "architectures": [f"{LAYOUTS[layout].name}ForCausalLM"],
        "model_type": layout,
        "vocab_size": vocab_size,
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.effective_kv_heads,
        "head_dim": settings.effective_head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": settings.norm_eps,
        # the first is read by transformers 4, the second by 5
        "rope_theta": settings.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": settings.rope_theta},
        "tie_word_embeddings": settings.tied_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": dtype,
        **own[layout],
        **_experts_to_config(settings, layout),
    }


def _experts_to_config(settings: ModelSettings, layout: LayoutName) -> dict[str, Any]:
    """What config.json says about experts. Two of the layouts call the size of an expert ``intermediate_size``."""
    experts = settings.experts
    if experts is None:
        return {}
    sizes: dict[str, Any] = {"num_experts_per_tok": experts.top_k, "output_router_logits": False}
    if layout == "mixtral":
        return {**sizes, "intermediate_size": experts.intermediate_size, "num_local_experts": experts.number}
    sizes |= {"num_experts": experts.number, "norm_topk_prob": experts.normalised}
    if layout == "olmoe":
        return {**sizes, "intermediate_size": experts.intermediate_size}
    dense = [layer for layer in range(settings.layers) if not settings.has_experts(layer)]
    sizes |= {"moe_intermediate_size": experts.intermediate_size, "decoder_sparse_step": 1, "mlp_only_layers": dense}
    if layout == "qwen2_moe":
        sizes["shared_expert_intermediate_size"] = experts.shared * experts.intermediate_size
    return sizes


_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_EXPERT_SIZES = {
    "mixtral": ("num_local_experts", "num_experts_per_tok"),
    "olmoe": ("num_experts", "num_experts_per_tok"),
    "qwen2_moe": (
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
    ),
    "qwen3_moe": ("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
}
_SPELLINGS = ("num_local_experts", "num_experts")
"""Of one number, which transformers reads in either and writes in one that hangs on its version and the model."""
_KV_HEADS = {"mistral": 8, "qwen3": 32, "mixtral": 8, "qwen3_moe": 4}
"""Of transformers where config.json has none; elsewhere it is the heads."""
_NORM_EPS = {"mixtral": 1e-5, "olmoe": 1e-5}
_ROPE_THETA = {"mixtral": 1_000_000.0}


def from_config(config: Mapping[str, Any], origin: str) -> ModelSettings:
    """The settings of the decoder that computes what ``config`` describes.

    Args:
        config: the content of config.json.
        origin: in messages, where it came from.

    Raises:
        UserError: a decoder can't compute it: says which key is why.
    """
    name = str(config.get("model_type")).removeprefix(CUSTOM)
    kind = next((each for each in LAYOUTS if each == name), None)
    if kind is None:
        raise UserError(
            f"{origin}: model_type is {config.get('model_type')!r}; of transformers' models only "
            f"{', '.join(LAYOUTS)} are what Headrace computes."
        )
    numbers = [config[key] for key in _SPELLINGS if key in config]
    config = {**dict.fromkeys(_SPELLINGS, *numbers[:1]), **config} if numbers else config
    if missing := [key for key in (*_SIZES, *_EXPERT_SIZES.get(kind, ())) if not isinstance(config.get(key), int)]:
        raise UserError(f"{origin} lacks {', '.join(missing)}. Is it the config.json of a {kind} model?")
    if reasons := _unsupported(config, kind):
        raise UserError(f"{origin} describes what Headrace does not compute: {'; '.join(reasons)}.")
    heads = config["num_attention_heads"]
    plain = {
        "hidden_size": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or _KV_HEADS.get(kind, heads),
        "head_dim": config.get("head_dim") or (128 if kind == "qwen3" else config["hidden_size"] // heads),
        "intermediate_size": config["intermediate_size"],
        "rope_theta": float(
            _rope(config).get("rope_theta") or config.get("rope_theta") or _ROPE_THETA.get(kind, 10_000.0)
        ),
        "norm_eps": float(config.get("rms_norm_eps", _NORM_EPS.get(kind, 1e-6))),
        "qk_norm": LAYOUTS[kind].qk_norm,
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        "linear": config.get("headrace_rules", []),
        "experts": _experts_from_config(config, kind, origin) if LAYOUTS[kind].experts else None,
    }
    return build_settings(ModelSettings, plain, origin)


def _experts_from_config(config: Mapping[str, Any], kind: str, origin: str) -> dict[str, Any]:
    """The ``model.experts`` section."""
    qwen = kind.startswith("qwen")
    sizes = {
        "number": config[_EXPERT_SIZES[kind][0]],
        "top_k": config["num_experts_per_tok"],
        "intermediate_size": config["moe_intermediate_size" if qwen else "intermediate_size"],
        "normalised": kind == "mixtral" or bool(config.get("norm_topk_prob", False)),
    }
    if not qwen:
        return sizes
    if kind == "qwen2_moe":
        size, shared = sizes["intermediate_size"], config["shared_expert_intermediate_size"]
        if not shared or shared % size:
            raise UserError(
                f"{origin}: shared_expert_intermediate_size is {shared}; a decoder's shared experts have together a "
                f"multiple of moe_intermediate_size {size} (model.experts.shared)."
            )
        sizes["shared"] = shared // size
    layers, step = config["num_hidden_layers"], config.get("decoder_sparse_step", 1)
    dense = set(config.get("mlp_only_layers") or ())
    wanted = [layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0]
    for every in range(1, layers + 1):
        if wanted and wanted == list(range(wanted[0], layers, every)):
            return {**sizes, "dense_first": wanted[0], "every": every}
    raise UserError(
        f"{origin} has experts in the blocks {wanted} of {layers}; a decoder has them in every so many-th block from "
        "one on (model.experts.dense_first, every)."
    )


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers 5 calls ``rope_parameters``; of ``rope_scaling``, version 4's, it takes the same and first."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _unsupported(config: Mapping[str, Any], kind: str) -> list[str]:
    """What of ``config`` a decoder has no setting for. A key that is missing has the default of transformers."""
    found = []
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        found.append(f"hidden_act is {config['hidden_act']!r}, a decoder's feed-forward has silu")
    found += [f"{key} is true, a decoder has no bias" for key in ("attention_bias", "mlp_bias") if config.get(key)]
    if kind == "qwen2_moe" and config.get("qkv_bias", True):
        found.append("qkv_bias is true, a decoder has no bias")
    rope = _rope(config)
    others = {key: value for key, value in rope.items() if key not in ("rope_type", "type", "rope_theta")}
    others["partial_rotary_factor"] = others.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default" or any(value not in (None, 1.0) for value in others.values()):
        found.append(f"rope_scaling is { ({**rope, **others})!r}, a decoder has plain rotary positions")
    windowed = config.get("use_sliding_window", False) if kind.startswith("qwen") else kind in ("mistral", "mixtral")
    window = config.get("sliding_window", None if kind == "mixtral" else 4096)
    if windowed and window is not None:
        found.append(f"sliding_window is {window!r}, a decoder sees its whole document")
    if config.get("clip_qkv") is not None:
        found.append(f"clip_qkv is {config['clip_qkv']!r}, a decoder's queries, keys and values have no bound")
    if any(each != "full_attention" for each in config.get("layer_types") or ()):
        found.append(f"layer_types are {sorted(set(config['layer_types']))}, a decoder has full_attention")
    if config.get("quantization_config"):
        found.append("the weights are quantised (quantization_config)")
    return found
