"""Tokens to their experts and back: the slots sorted by expert, without a bound on how many an expert has (dropless).

Every move is a permutation, and so is its gradient: nothing is added up by atomic operations, whose order, and with it
the last bit, would change from run to run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dispatch:
    """Where each slot of n tokens, K each, goes; those without an expert stand at the end."""

    order: Tensor
    """[n K] int64: which slot (token times K and place) is the i-th in the order of the experts."""
    places: Tensor
    """[n K] int64: the inverse, where each slot stands in that order."""
    ends: Tensor
    """[E] int32: where the slots of each expert end."""
    slots: int
    """K."""

    @classmethod
    def plan(cls, experts: Tensor, kept: Tensor | None, number: int) -> Dispatch:
        """From the experts [n, K] of each token, below ``number``, and which slots are filled [n, K] (None: all)."""
        keys = experts if kept is None else torch.where(kept, experts, number)
        ordered, order = keys.flatten().sort(stable=True)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        ends = torch.searchsorted(ordered, torch.arange(number, device=order.device), right=True, out_int32=True)
        return cls(order, places, ends, experts.shape[1])

    def gather(self, x: Tensor) -> Tensor:
        """The token of each slot, in the order of the experts: [n, d] -> [n K, d]."""
        made: Tensor = _Gather.apply(x, self)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return made

    def combine(self, y: Tensor, weights: Tensor) -> Tensor:
        """Σ_k w_k y of each token's slots: [n K, d] in the order of the experts, weights [n, K] -> [n, d]."""
        made: Tensor = _Combine.apply(y, weights, self)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return made


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Dispatch) -> Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.order // plan.slots)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        plan: Dispatch = ctx.plan
        by_slot = gradients[0].index_select(0, plan.places)
        return by_slot.view(-1, plan.slots, by_slot.shape[-1]).sum(dim=1), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, plan: Dispatch) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(y, weights)
        by_token = y.index_select(0, plan.places).view(-1, plan.slots, y.shape[-1])
        return by_token.mul_(weights[..., None]).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (y, weights), plan = ctx.saved_tensors, ctx.plan
        of_slots = gradients[0].index_select(0, plan.order // plan.slots)
        of_weights = (of_slots * y).sum(dim=-1, dtype=weights.dtype)
        by_slot = weights.flatten().index_select(0, plan.order)
        return of_slots.mul_(by_slot[:, None]), of_weights.index_select(0, plan.places).view_as(weights), None
