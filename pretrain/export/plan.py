"""What an export will hold: each tensor known by name, shape and type before it is read, and how it is made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.initial_weights import CheckpointWeights
from pretrain.model.linear import block_shapes, method_of
from pretrain.model.linear.terms import DENSE, Term, mergeable, merged
from pretrain.model.mup import forward_multipliers

from .architecture import CUSTOM, architecture
from .names import their_module, their_name
from .write import Planned


class ExportPlan:
    """The tensors of an export by transformers' names, and the layers among them that need code of ours.

    Attributes:
        tensors: all of them.
        custom: the arguments of ``HeadraceLinear`` for each layer that is not dense, by transformers' name.
        merged: how many layers of several parts become dense ones.
    """

    def __init__(self, weights: CheckpointWeights, dtype: torch.dtype, unmerged: bool) -> None:
        self.tensors: dict[str, Planned] = {}
        self.custom: dict[str, dict[str, Any]] = {}
        self.merged = 0
        self._weights, self._dtype, self._unmerged = weights, dtype, unmerged
        self._settings = weights.settings
        self._rules: list[dict[str, Any]] = []
        layers = {
            f"blocks.{n}.{name}": shape
            for n in range(self._settings.layers)
            for name, shape in block_shapes(self._settings, n).items()
        }
        for name in weights.shapes:
            if name.rpartition(".")[0] not in layers:
                self._add(name, self._factor(name))
        for layer, (in_features, out_features) in layers.items():
            self._add_layer(layer, in_features, out_features)

    def additions(self) -> dict[str, Any]:
        """What config.json says about the layers that need code of ours."""
        if not self.custom:
            return {}
        kind = architecture(self._settings)
        return {
            "architectures": [f"Headrace{kind}ForCausalLM"],
            "model_type": f"{CUSTOM}{kind.lower()}",
            "auto_map": {
                "AutoConfig": f"modeling_headrace.Headrace{kind}Config",
                "AutoModelForCausalLM": f"modeling_headrace.Headrace{kind}ForCausalLM",
            },
            "headrace_layers": self.custom,
            "headrace_rules": self._rules,
        }

    def _factor(self, name: str) -> float:
        """What multiplies a tensor, or a linear layer, so that a model without multipliers computes the same."""
        multipliers, settings = forward_multipliers(self._settings), self._settings
        if name == "embedding.weight":
            return multipliers.embedding
        if name == "norm.weight":
            # the head's multiplier: a tied head has the embedding's already
            return multipliers.head / (multipliers.embedding if settings.tied_embeddings else 1.0)
        scored = "attention.query_norm.weight" if settings.qk_norm else "attention.query"
        return multipliers.attention if name.endswith(scored) else 1.0

    def _add(self, name: str, factor: float) -> None:
        def make() -> Tensor:
            value = self._weights.read(name)
            return value if factor == 1.0 else value * factor

        outline = self._weights.outline[name]
        dtype = self._dtype if outline.is_floating_point() else outline.dtype
        self.tensors[their_name(name)] = Planned(tuple(outline.shape), dtype, make)

    def _add_layer(self, layer: str, in_features: int, out_features: int) -> None:
        terms, factor = method_of(layer, self._settings).terms(), self._factor(layer)
        dense = terms == DENSE
        if dense or (mergeable(terms) and not self._unmerged):

            def make() -> Tensor:
                weight = merged(terms, lambda own: self._weights.read(f"{layer}.{own}"), in_features, out_features)
                return weight if factor == 1.0 else weight * factor

            self.merged += not dense
            self.tensors[f"{their_module(layer)}.weight"] = Planned((out_features, in_features), self._dtype, make)
        else:
            scaled = tuple(term._replace(scale=term.scale * factor) for term in terms)
            self._keep_layer(layer, scaled, in_features, out_features)

    def _keep_layer(self, layer: str, terms: tuple[Term, ...], in_features: int, out_features: int) -> None:
        tensors = {}
        for name, outline in self._weights.outline.items():
            owner, _, own = name.rpartition(".")
            if owner == layer:
                self._add(name, 1.0)
                dtype = "float" if outline.is_floating_point() else str(outline.dtype).removeprefix("torch.")
                tensors[own] = [list(outline.shape), dtype]
        self.custom[their_module(layer)] = {
            "in_features": in_features,
            "out_features": out_features,
            "tensors": tensors,
            "terms": [term._asdict() for term in terms],
        }
        block, name = layer.split(".", 2)[1:]
        rule = method_of(layer, self._settings).model_dump(mode="json")
        self._rules.append({**rule, "modules": [name], "layers": block})
