"""A dense weight of which the smallest entries are taken away: unstructured magnitude pruning.

y = x (M ∘ W)ᵀ with a mask M of 0 and 1. Two ways to a mask: ``gradual`` prunes on the way (Zhu and Gupta 2017, arXiv
1710.01878); ``mask_from`` takes it from the weights of another run before the first step, as the lottery-ticket
experiments do (Frankle et al. 2020, arXiv 1912.05671), which also start from early weights (``training.rewind``).

An entry that is pruned stays so. Its gradient is exactly 0 and its value in W, which the optimizer may still move, has
no part in anything: neither in y, nor in the norm of the gradient, nor in what is pruned next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipeline.settings import Settings
from pretrain.model.initialize import Draw
from pretrain.model.pruning import Scope, keys, masks, sparsity_at
from pretrain.model.scheduled import ReadParameter

from ..base import LinearCost, LinearSettings
from ..terms import Term


class MagnitudePrunedLinear(nn.Module):
    """y = x (M ∘ W)ᵀ: x [..., in_features], W and M [out_features, in_features], no bias."""

    mask: Tensor

    def __init__(
        self, in_features: int, out_features: int, init_std: float, schedule: MagnitudePrunedSettings | None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.init_std = init_std
        self.schedule = schedule
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_buffer("mask", torch.ones(out_features, in_features, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _MaskedProduct.apply(x, self.weight, self.mask)  # type: ignore[no-untyped-call]
        return y

    def initial_values(self, draw: Draw) -> dict[str, Tensor]:
        shape = (self.out_features, self.in_features)
        return {"weight": draw("weight", shape, self.init_std), "mask": torch.ones(shape, dtype=torch.bool)}


class _MaskedProduct(torch.autograd.Function):
    """x (M ∘ W)ᵀ. Keeps W and M for the backward pass, not their product, which would be the weight once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, mask)
        return x.matmul(torch.where(mask, weight, 0.0).t())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, mask = ctx.saved_tensors
        (gradient,) = gradients
        of_weight = gradient.flatten(0, -2).t().mm(x.flatten(0, -2))
        return gradient.matmul(torch.where(mask, weight, 0.0)), torch.where(mask, of_weight, 0.0), None


class GradualSettings(Settings):
    """Pruning on the way, by a cubic that falls off: much at the beginning, little at the end."""

    begin_step: int = Field(ge=0)
    """Optimizer steps done when the first weights are pruned."""
    end_step: int = Field(ge=1)
    """Optimizer steps done when the last weights are pruned; the rest of the run trains what is left."""
    every_steps: int = Field(ge=1)
    """Optimizer steps from one pruning to the next; divides ``end_step - begin_step``."""
    initial_sparsity: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the weights that the first pruning takes."""

    @model_validator(mode="after")
    def _check(self) -> GradualSettings:
        length = self.end_step - self.begin_step
        if length <= 0:
            raise ValueError(f"end_step {self.end_step} must come after begin_step {self.begin_step}")
        if length % self.every_steps:
            below = self.begin_step + length // self.every_steps * self.every_steps
            fitting = [step for step in (below, below + self.every_steps) if step > self.begin_step]
            raise ValueError(
                f"every_steps {self.every_steps} does not divide end_step - begin_step = {length}, so that nothing "
                f"would be pruned at end_step; the nearest end_step is {' or '.join(map(str, fitting))}"
            )
        return self


class MagnitudePrunedSettings(LinearSettings):
    """A dense weight whose smallest entries are pruned."""

    kind: Literal["magnitude_pruned"]
    sparsity: float = Field(ge=0.0, lt=1.0)
    """Share of the weights that are pruned in the end."""
    scope: Scope = "layer"
    """Whether each layer loses this share by itself, or all layers of the rule together, by one threshold."""
    mask_from: str | None = None
    """A checkpoint (a ``step_...`` folder) by whose weights the mask is decided before the first step; it stays. Read
    once, when the run begins; a resumed run has its own."""
    gradual: GradualSettings | None = None
    """Prune on the way, by the weights as they are then. Exactly one of ``mask_from`` and ``gradual`` is given."""

    @model_validator(mode="after")
    def _check(self) -> MagnitudePrunedSettings:
        if (self.mask_from is None) == (self.gradual is None):
            raise ValueError("give exactly one of mask_from and gradual: when the weights to prune are chosen")
        if self.gradual and self.gradual.initial_sparsity > self.sparsity:
            raise ValueError(
                f"gradual.initial_sparsity {self.gradual.initial_sparsity} is above sparsity {self.sparsity}: what is "
                "pruned does not come back"
            )
        return self

    def make(self, in_features: int, out_features: int, init_std: float) -> nn.Module:
        return MagnitudePrunedLinear(in_features, out_features, init_std, self if self.gradual else None)

    def cost(self, in_features: int, out_features: int) -> LinearCost:
        whole = in_features * out_features
        return LinearCost(whole, whole, 0, buffer_bytes=whole)

    def terms(self) -> tuple[Term, ...]:
        return (Term("weight", mask="mask"),)

    def check_steps(self, first: int, total: int) -> None:
        if self.gradual and not first <= self.gradual.begin_step < self.gradual.end_step < total:
            raise ValueError(
                f"gradual prunes after steps {self.gradual.begin_step} to {self.gradual.end_step}, but the run goes "
                f"from {first} to {total}: begin_step must be {first} or later, end_step {total - 1} or earlier"
            )

    def due(self, step: int) -> bool:
        when = self.gradual
        return (
            when is not None
            and when.begin_step <= step <= when.end_step
            and (step - when.begin_step) % when.every_steps == 0
        )

    def update(self, step: int, modules: Mapping[str, MagnitudePrunedLinear], read: ReadParameter) -> None:
        assert self.gradual is not None
        when = self.gradual
        share = sparsity_at(step, when.begin_step, when.end_step, when.initial_sparsity, self.sparsity)
        sizes = {name: module.mask.numel() for name, module in modules.items()}

        def keys_of(name: str) -> Tensor:
            return keys(read(f"{name}.weight"), modules[name].mask)

        for name, mask in masks(sizes, keys_of, share, self.scope):
            modules[name].mask.copy_(mask)
