"""Long curves made small enough to draw, without hiding an outlier."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

POINTS = 2000
"""A curve with more points than this is thinned."""

COLUMNS = 120
"""Columns of a heat map at most."""


def thin(steps: Sequence[int], values: Sequence[float], points: int = POINTS) -> tuple[list[int], list[float]]:
    """At most ``points`` points: the smallest and the largest finite value of each of equally long stretches.

    Both keep their own step; the first and the last point stay as well. A stretch without a finite value keeps one
    point, which is drawn as a gap.
    """
    if len(steps) <= points:
        return list(steps), list(values)
    stretches = (points - 2) // 2
    kept = {0, len(steps) - 1}
    for place in range(stretches):
        stretch = range(place * len(steps) // stretches, (place + 1) * len(steps) // stretches)
        finite = [index for index in stretch if math.isfinite(values[index])] or [stretch[0]]
        kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
    order = sorted(kept)
    return [steps[index] for index in order], [values[index] for index in order]


def half_life(count: int) -> int:
    """Lines after which a smoothed curve has forgotten half: a fiftieth of the curve."""
    return max(1, round(count / 50))


def smooth(values: Sequence[float], half_life: float) -> list[float]:
    """The exponential mean of ``values`` so far, without a bias towards the start (as in Adam); skips the non-finite.

    mean_i = sum_j d^(i-j) v_j / sum_j d^(i-j) over finite v_j with j <= i, d = 2^(-1 / half_life).
    """
    decay = 0.5 ** (1 / half_life)
    total = weight = 0.0
    smoothed = []
    for value in values:
        if math.isfinite(value):
            total, weight = total * decay + value, weight * decay + 1
        smoothed.append(total / weight if weight else math.nan)
    return smoothed


def sum_columns(
    steps: Sequence[int], counts: Sequence[Sequence[int]], columns: int = COLUMNS
) -> tuple[list[float], list[list[int]]]:
    """Histograms [n][bins] of neighbouring lines added up into at most ``columns`` columns.

    Returns the edges [m + 1] of the columns on the step axis (halfway between neighbours) and the sums [m][bins].
    """
    edges, stretches = _stretches(steps, columns)
    return edges, [[sum(column) for column in zip(*(counts[line] for line in each), strict=True)] for each in stretches]


def mean_columns(
    steps: Sequence[int], values: Sequence[Sequence[float]], columns: int = COLUMNS
) -> tuple[list[float], list[list[float]]]:
    """The same of means: numbers [n][rows] of neighbouring lines into [m][rows]."""
    edges, stretches = _stretches(steps, columns)
    means = [
        [sum(column) / len(each) for column in zip(*(values[line] for line in each), strict=True)] for each in stretches
    ]
    return edges, means


def _stretches(steps: Sequence[int], columns: int) -> tuple[list[float], list[range]]:
    """The edges of the columns, and which lines each is made of."""
    groups = min(len(steps), columns)
    bounds = [place * len(steps) // groups for place in range(groups + 1)]
    gap = (steps[-1] - steps[0]) / (len(steps) - 1) if len(steps) > 1 else 1.0
    middles = [(steps[bound - 1] + steps[bound]) / 2 for bound in bounds[1:-1]]
    edges = [steps[0] - gap / 2, *middles, steps[-1] + gap / 2]
    return edges, [range(start, stop) for start, stop in itertools.pairwise(bounds)]
