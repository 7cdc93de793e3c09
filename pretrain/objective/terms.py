"""Law 2, one denominator: the only place that turns numerators and denominators into what the engine is handed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Term:
    """One term ``coefficient * numerator / denominator`` of the objective of a whole optimizer step.

    ``numerator`` is this rank's share in this micro-step (scalar, with gradient); the numerators of all ranks and
    micro-steps sum up to the step's numerator. ``denominator`` is the whole step's, the same number on every rank and
    in every micro-step.
    """

    numerator: Tensor
    denominator: float
    coefficient: float = 1.0


def engine_loss(terms: Sequence[Term], world_size: int) -> Tensor:
    """The scalar whose gradient the engine is to average over ranks and sum over micro-steps.

    The step's objective is a SUM over ranks of ``Σ coefficient * numerator / denominator``; the engine takes the MEAN
    of the ranks' gradients, so every share is handed over ``world_size`` times as large (and the engine must not divide
    by the number of micro-steps: ``Engine.backward`` sees to that). A term whose step has nothing to count (denominator
    0) contributes exactly 0 and keeps the graph, so that every rank still takes part in the collectives.

    Args:
        terms: at least one.
        world_size: number of data-parallel ranks.

    Returns:
        scalar fp32.
    """
    shares = [
        term.numerator * (term.coefficient * world_size / term.denominator if term.denominator else 0.0)
        for term in terms
    ]
    return torch.stack(shares).sum() if len(shares) > 1 else shares[0]
