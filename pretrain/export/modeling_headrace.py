"""Models trained by Headrace with linear layers that no dense weight can stand for, for transformers 5.

Load with ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. Everything is transformers' own but
the linear layers that ``headrace_layers`` of config.json names. The output of such a layer is a sum of terms

    scale * f(x[..., columns] @ down.T) @ W.T

where W is ``weight``; or, with ``mask``, its entries where the mask is True; or, with ``places``, the values ``weight``
at these places of the flattened W, which is 0 elsewhere. Without ``down`` there is no product and no f; without
``columns`` the layer sees all its input features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ACTIVATIONS = {"identity": lambda x: x, "silu": F.silu, "gelu": F.gelu, "relu": F.relu}


class HeadraceLinear(nn.Module):
    """A linear layer as the sum of terms.

    Args:
        in_features, out_features: sizes of input and output.
        tensors: name to shape and dtype; those of a floating-point dtype are parameters, the others buffers.
        terms: each a dictionary of the fields above, which name tensors.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tensors: dict[str, tuple[list[int], str]],
        terms: list[dict[str, Any]],
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.terms = in_features, out_features, terms
        for name, (shape, dtype) in tensors.items():
            if dtype == "float":
                setattr(self, name, nn.Parameter(torch.empty(shape)))
            else:
                self.register_buffer(name, torch.zeros(shape, dtype=getattr(torch, dtype)))

    def forward(self, x: Tensor) -> Tensor:
        output = self.term(x, **self.terms[0])
        for term in self.terms[1:]:
            output = output + self.term(x, **term)
        return output

    def term(
        self,
        x: Tensor,
        weight: str,
        down: str | None,
        activation: str,
        columns: str | None,
        mask: str | None,
        places: str | None,
        scale: float,
    ) -> Tensor:
        matrix: Tensor = getattr(self, weight)
        if places is not None:
            flat = matrix.new_zeros(self.out_features * self.in_features)
            matrix = flat.scatter(0, getattr(self, places).long(), matrix).view(self.out_features, self.in_features)
        if mask is not None:
            matrix = torch.where(getattr(self, mask), matrix, 0.0)
        if columns is not None:
            x = x.index_select(-1, getattr(self, columns))
        if down is not None:
            x = ACTIVATIONS[activation](F.linear(x, getattr(self, down)))
        return F.linear(x * scale if scale != 1.0 else x, matrix)


def put_in(model: nn.Module, config: Any) -> None:
    """Replace the layers that config.json names."""
    for name, layer in config.headrace_layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, HeadraceLinear(**layer))


class HeadraceLlamaConfig(LlamaConfig):
    model_type = "headrace_llama"
    headrace_layers: dict[str, Any] | None = None
    headrace_rules: list[dict[str, Any]] | None = None


class HeadraceMistralConfig(MistralConfig):
    model_type = "headrace_mistral"
    headrace_layers: dict[str, Any] | None = None
    headrace_rules: list[dict[str, Any]] | None = None


class HeadraceQwen3Config(Qwen3Config):
    model_type = "headrace_qwen3"
    headrace_layers: dict[str, Any] | None = None
    headrace_rules: list[dict[str, Any]] | None = None


class HeadraceLlamaForCausalLM(LlamaForCausalLM):
    config_class = HeadraceLlamaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        put_in(self, config)


class HeadraceMistralForCausalLM(MistralForCausalLM):
    config_class = HeadraceMistralConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        put_in(self, config)


class HeadraceQwen3ForCausalLM(Qwen3ForCausalLM):
    config_class = HeadraceQwen3Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        put_in(self, config)
