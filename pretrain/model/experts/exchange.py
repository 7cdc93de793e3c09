"""Tokens to the ranks that hold their experts, and what these made of them back.

Rows come sorted by expert and ranks hold neighbouring experts, so that what goes to a rank lies together: one
all-to-all of counts, then one of rows, however unequal, none at all included. Every rank of the group takes part in
each forward pass, and again where a block is recomputed. All moves are permutations, with their gradients written out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.distributed import Distributed
from pretrain.model.eager import eager


@dataclass(frozen=True)
class Exchange:
    """Which rows of one forward pass travel between the ranks that hold a block's experts together."""

    across: Distributed
    leaving: list[int]
    """Rows of this rank's tokens for each rank's experts."""
    arriving: list[int]
    """Rows of each rank's tokens for this rank's experts."""
    order: Tensor
    """[sum(arriving)] int64: which of the rows, as they arrive from rank after rank, is the i-th in the order of the
    experts."""
    places: Tensor
    """[sum(arriving)] int64: the inverse."""
    ends: Tensor
    """[E / ranks] int32: where the rows of each of this rank's experts end."""

    @classmethod
    @eager
    def plan(cls, ends: Tensor, across: Distributed) -> Exchange:
        """From where this rank's rows of all experts end, [E] int32. Collective; the host learns how many rows move."""
        ranks = across.world_size
        counts = torch.diff(ends, prepend=ends.new_zeros(1)).view(ranks, -1)
        received = across.all_to_all(counts, [1] * ranks, [1] * ranks)
        leaving, arriving = torch.stack([counts.sum(dim=1), received.sum(dim=1)]).tolist()
        local = torch.arange(counts.shape[1], device=ends.device).repeat(ranks)
        experts = local.repeat_interleave(received.flatten(), output_size=sum(arriving))
        order = experts.argsort(stable=True)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return cls(across, leaving, arriving, order, places, received.sum(dim=0).cumsum(0).int())

    @eager
    def there(self, rows: Tensor) -> Tensor:
        """Rows [n, d] of this rank's tokens, in the order of all experts, for those of its experts, in their order,
        [sum(arriving), d]; rows beyond the last expert's stay. Collective."""
        made: Tensor = _There.apply(rows, self)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return made

    @eager
    def back(self, outputs: Tensor, number: int) -> Tensor:
        """The way back: [sum(arriving), d] -> [number, d]; those that had stayed are 0. Collective."""
        made: Tensor = _Back.apply(outputs, number, self)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return made

    def _send(self, rows: Tensor) -> Tensor:
        own = rows[: sum(self.leaving)].contiguous()
        return self.across.all_to_all(own, self.leaving, self.arriving).index_select(0, self.order)

    def _return(self, rows: Tensor, number: int) -> Tensor:
        returned = self.across.all_to_all(rows.index_select(0, self.places), self.arriving, self.leaving)
        stayed = number - len(returned)
        return torch.cat([returned, returned.new_zeros(stayed, rows.shape[1])]) if stayed else returned


class _There(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange, ctx.number = exchange, len(rows)
        return exchange._send(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange._return(gradients[0], ctx.number), None


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, number: int, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange._return(outputs, number)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.exchange._send(gradients[0]), None, None
