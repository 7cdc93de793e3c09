"""config.json: the shape of a decoder as transformers says it, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.settings import build_settings
from pretrain.model import ModelSettings

CUSTOM = "headrace_"
"""Prefix of ``model_type`` where ``modeling_headrace.py`` is needed: transformers must not take its own class then."""


def architecture(settings: ModelSettings) -> str:
    """Which of transformers' classes computes the same.

    Qwen3 is Llama with the norm of query and key heads; Mistral without its window is Llama whose ``hidden_size`` need
    not be a multiple of the heads.
    """
    if settings.qk_norm:
        return "Qwen3"
    return "Mistral" if settings.hidden_size % settings.heads else "Llama"


def to_config(settings: ModelSettings, vocab_size: int, context: int, dtype: str) -> dict[str, Any]:
    """config.json of a decoder, without what its tokenizer says.

    Args:
        settings: the shape.
        vocab_size: rows of the embedding.
        context: tokens of a training sequence: the longest that the model has seen.
        dtype: of the tensors, by torch's name.
    """
    kind = architecture(settings)
    own: dict[str, dict[str, Any]] = {
        "Llama": {"attention_bias": False, "mlp_bias": False},
        "Mistral": {"sliding_window": None},
        "Qwen3": {"attention_bias": False, "use_sliding_window": False, "sliding_window": None},
    }
    return {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
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
        **own[kind],
    }


_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def from_config(config: Mapping[str, Any], origin: str) -> ModelSettings:
    """The settings of the decoder that computes what ``config`` describes.

    Args:
        config: the content of config.json.
        origin: in messages, where it came from.

    Raises:
        UserError: a decoder can't compute it: says which key is why.
    """
    kind = str(config.get("model_type")).removeprefix(CUSTOM)
    if kind not in ("llama", "mistral", "qwen3"):
        raise UserError(
            f"{origin}: model_type is {config.get('model_type')!r}; of transformers' models only llama, mistral and "
            "qwen3 are what Headrace computes."
        )
    if missing := [key for key in _SIZES if not isinstance(config.get(key), int)]:
        raise UserError(f"{origin} lacks {', '.join(missing)}. Is it the config.json of a {kind} model?")
    if reasons := _unsupported(config, kind):
        raise UserError(f"{origin} describes what Headrace does not compute: {'; '.join(reasons)}.")
    heads = config["num_attention_heads"]
    plain = {
        "hidden_size": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or {"llama": heads, "mistral": 8, "qwen3": 32}[kind],
        "head_dim": config.get("head_dim") or (128 if kind == "qwen3" else config["hidden_size"] // heads),
        "intermediate_size": config["intermediate_size"],
        "rope_theta": float(_rope(config).get("rope_theta") or config.get("rope_theta") or 10_000.0),
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "qk_norm": kind == "qwen3",
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        "linear": config.get("headrace_rules", []),
    }
    return build_settings(ModelSettings, plain, origin)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers 5 calls ``rope_parameters``; of ``rope_scaling``, version 4's, it takes the same and first."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _unsupported(config: Mapping[str, Any], kind: str) -> list[str]:
    """What of ``config`` a decoder has no setting for. A key that is missing has the default of transformers."""
    found = []
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        found.append(f"hidden_act is {config['hidden_act']!r}, a decoder's feed-forward has silu")
    found += [f"{key} is true, a decoder has no bias" for key in ("attention_bias", "mlp_bias") if config.get(key)]
    rope = _rope(config)
    others = {key: value for key, value in rope.items() if key not in ("rope_type", "type", "rope_theta")}
    others["partial_rotary_factor"] = others.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default" or any(value not in (None, 1.0) for value in others.values()):
        found.append(f"rope_scaling is { ({**rope, **others})!r}, a decoder has plain rotary positions")
    windowed = config.get("use_sliding_window", False) if kind == "qwen3" else kind == "mistral"
    if windowed and config.get("sliding_window", 4096) is not None:
        found.append(f"sliding_window is {config.get('sliding_window', 4096)!r}, a decoder sees its whole document")
    if any(each != "full_attention" for each in config.get("layer_types") or ()):
        found.append(f"layer_types are {sorted(set(config['layer_types']))}, a decoder has full_attention")
    if config.get("quantization_config"):
        found.append("the weights are quantised (quantization_config)")
    return found
