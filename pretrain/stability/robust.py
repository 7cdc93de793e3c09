"""How far a value lies from the others, whatever a few of them are."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

NORMAL = 0.6745
"""MAD of a normal distribution of variance 1, so that z-scores are standard deviations there."""


def robust_z(value: float, others: Sequence[float]) -> float:
    """The modified z-score 0.6745 (x - median) / MAD of Iglewicz and Hoaglin, How to Detect and Handle Outliers (1993).

    MAD is the median of the absolute distances from the median. Where it is 0 (more than half of ``others`` are equal)
    there is no scale to judge by, and the score is 0.

    Args:
        value: x, finite.
        others: at least one, finite.
    """
    median = statistics.median(others)
    deviation = statistics.median([abs(other - median) for other in others])
    return NORMAL * (value - median) / deviation if deviation else 0.0
