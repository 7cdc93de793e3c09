"""What an export will hold: each tensor known by name, shape and type before it is read, and how it is made."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from pretrain.initial_weights import CheckpointWeights
from pretrain.model.linear import block_shapes, method_of
from pretrain.model.linear.terms import DENSE, Term, mergeable, merged
from pretrain.model.mup import forward_multipliers

from .layouts import CUSTOM, LAYOUTS
from .names import (
    SHARED_DOWN,
    SHARED_GATE,
    LayoutName,
    in_files_of,
    is_stack,
    their_expert,
    their_module,
    their_name,
)
from .write import Planned


class ExportPlan:
    """The tensors of an export by transformers' names, and the layers among them that need code of ours.

    Raises:
        UserError: ``layout`` has no words for a layer, or for what a router has learned.

    Attributes:
        tensors: all of them.
        custom: the arguments of ``HeadraceLinear`` for each layer that is not dense, by transformers' name.
        merged: how many layers of several parts become dense ones.
    """

    def __init__(self, weights: CheckpointWeights, dtype: torch.dtype, unmerged: bool, layout: LayoutName) -> None:
        self.tensors: dict[str, Planned] = {}
        self.custom: dict[str, dict[str, Any]] = {}
        self.merged = 0
        self._weights, self._dtype, self._unmerged, self._layout = weights, dtype, unmerged, layout
        self._stack: tuple[str, Tensor] | None = None
        self._settings = weights.settings
        self._rules: list[dict[str, Any]] = []
        layers = {
            f"blocks.{n}.{name}": shape
            for n in range(self._settings.layers)
            for name, shape in block_shapes(self._settings, n).items()
        }
        for name in weights.shapes:
            if is_stack(name):
                self._add_stack(name)
            elif name.endswith("router.selection_bias"):
                self._check_selection_bias(name)
            elif name.rpartition(".")[0] not in layers:
                self._add(name, self._factor(name))
        for layer, (in_features, out_features) in layers.items():
            self._add_layer(layer, in_features, out_features)
        if LAYOUTS[layout].shared:
            for block in self._settings.expert_layers:
                self._add_open_gate(block)

    def additions(self) -> dict[str, Any]:
        """What config.json says about the layers that need code of ours."""
        if not self.custom:
            return {}
        kind = LAYOUTS[self._layout].name
        return {
            "architectures": [f"Headrace{kind}ForCausalLM"],
            "model_type": f"{CUSTOM}{self._layout}",
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
        if name.endswith(SHARED_DOWN):
            return 2.0  # the gate that only transformers has is 1/2
        scored = "attention.query_norm.weight" if settings.qk_norm else "attention.query"
        return multipliers.attention if name.endswith(scored) else 1.0

    def _add(self, name: str, factor: float) -> None:
        def make() -> Tensor:
            value = self._weights.read(name)
            return value if factor == 1.0 else value * factor

        outline = self._weights.outline[name]
        dtype = self._dtype if outline.is_floating_point() else outline.dtype
        self.tensors[in_files_of(self._layout, their_name(name))] = Planned(tuple(outline.shape), dtype, make)

    def _add_stack(self, name: str) -> None:
        """The matrices of a block's experts; the routed experts' common factor goes into the last ones."""
        experts = self._settings.experts
        assert experts is not None
        factor = experts.scaling if name.endswith(".down") else 1.0
        number, *shape = self._weights.outline[name].shape

        def make(expert: int) -> Tensor:
            if self._stack is None or self._stack[0] != name:  # read once for all that are written one after the other
                self._stack = name, self._weights.read(name)
            matrix = self._stack[1][expert]
            return matrix if factor == 1.0 else matrix * factor

        for expert in range(number):
            theirs = their_expert(name, expert, self._layout)
            self.tensors[theirs] = Planned(tuple(shape), self._dtype, partial(make, expert))

    def _add_open_gate(self, block: int) -> None:
        """The gate of a block's shared expert, which lets every token through alike."""
        shape = (1, self._settings.hidden_size)
        self.tensors[f"model.layers.{block}.{SHARED_GATE}"] = Planned(shape, self._dtype, lambda: torch.zeros(shape))

    def _check_selection_bias(self, name: str) -> None:
        largest = float(self._weights.read(name).abs().max())
        if largest:
            raise UserError(
                f"the model can't be exported as {self._layout}: {name} (model.experts.selection_bias) is not 0, up to "
                f"{largest:.3g}, and transformers chooses experts by their scores alone there. Balance what is to be "
                "exported by objective.balancing.losses, not by bias; go on from this one with model.weights_from."
            )

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
        if self._settings.experts is not None:
            raise UserError(
                f"{layer} is {method_of(layer, self._settings).kind} (model.linear), which no dense weight stands for; "
                "of a model with experts only layers that become dense ones can be exported, and without --unmerged."
            )
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
