"""What a forward pass says of its routing: sums over the tokens that count, sequence by sequence.

Nothing is kept in the model. A block with experts returns these sums beside its output, so that a recomputed block, a
scoring pass or an evaluation counts nothing by itself (law 3); whoever asked for them adds them up once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCALARS = 5


def routing_width(experts: int) -> int:
    """Columns of a :class:`Routing` in one tensor."""
    return 3 * experts + SCALARS


@dataclass(frozen=True)
class Routing:
    """Sums over the tokens of each sequence that count, fp32. All are [..., b] or [..., b, E]: those of a block have no
    further dimension, those of a decoder begin with the blocks that have experts, [L, b] and [L, b, E].

    One tensor holds them (:attr:`packed`), as recompute and ZeRO-3 want the outputs of a block. Only ``scores``,
    ``squared_log_partition`` and ``entropy`` have gradients.
    """

    packed: Tensor
    """[..., b, routing_width(E)]."""

    @classmethod
    def pack(cls, wide: tuple[Tensor, Tensor, Tensor], scalars: tuple[Tensor, ...]) -> Routing:
        """From ``choices``, ``loads`` and ``scores`` [b, E], and the others [b], in the order below."""
        return cls(torch.cat([*wide, torch.stack(scalars, dim=-1)], dim=-1))

    def without(self, dropped: Tensor) -> Routing:
        """With sums of 0, and no gradient, for the sequences of which ``dropped`` [b] is True."""
        return Routing(self.packed.masked_fill(dropped[:, None], 0.0))

    @property
    def experts(self) -> int:
        return (self.packed.shape[-1] - SCALARS) // 3

    @property
    def choices(self) -> Tensor:
        """[..., b, E] tokens with each expert among the ``top_k`` of their scores, without selection bias: f of the
        balancing losses."""
        return self.packed[..., : self.experts]

    @property
    def loads(self) -> Tensor:
        """[..., b, E] slots of each expert as the tokens were routed, before any was dropped."""
        return self.packed[..., self.experts : 2 * self.experts]

    @property
    def scores(self) -> Tensor:
        """[..., b, E] sums of the router's probabilities: P of the balancing losses."""
        return self.packed[..., 2 * self.experts : 3 * self.experts]

    @property
    def tokens(self) -> Tensor:
        """[..., b] tokens that count."""
        return self.packed[..., -5]

    @property
    def squared_log_partition(self) -> Tensor:
        """[..., b] sums of (log Σ exp logits)²."""
        return self.packed[..., -4]

    @property
    def entropy(self) -> Tensor:
        """[..., b] sums of the entropy of ``model.experts.entropy``; 0 without it."""
        return self.packed[..., -3]

    @property
    def shannon(self) -> Tensor:
        """[..., b] sums of Shannon's entropy of the router's probabilities, nats."""
        return self.packed[..., -2]

    @property
    def dropped(self) -> Tensor:
        """[..., b] slots dropped because their expert was full."""
        return self.packed[..., -1]
