"""A step computed twice from the same state: what tells bad data from bad hardware."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .judge import Figures


@dataclass(frozen=True)
class Computed:
    """What one computation of a step came to, on one rank."""

    figures: Figures
    """Of all ranks."""
    own: tuple[float, ...]
    """Of this rank alone, before anything was reduced: its share of the objective, its losses by source, and the sum of
    squares of the gradient that came back to the embedding's output."""

    def same(self, other: Computed) -> bool:
        return repr(self.figures) == repr(other.figures)  # to the last bit, and NaN is NaN

    def same_own(self, other: Computed) -> bool:
        return repr(self.own) == repr(other.own)


def verdict(first: Computed, again: Computed, differing: Sequence[str]) -> str:
    """What two computations of a step say, in words.

    Args:
        first: of this rank.
        again: the second time.
        differing: the ranks whose own part was another, as ``rank 1 on host``.
    """
    if first.same(again) and not differing:
        return "Computed again it came to the same bits: the data or the arithmetic, not the hardware"
    figures = again.figures
    told = f"Computed again it came to loss {figures.loss}, gradient norm {figures.gradient_norm}: hardware, on "
    if differing:
        return told + " and ".join(differing)
    return told + "a rank that is not known (gradients of weights, or their reduction)"
