"""Means over seeds with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean and half the width of its confidence interval; the half is NaN for a single value."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of independent values (one a seed) and its interval by Student's t distribution; no interval
    for a single value, or where one is not finite."""
    if len(values) < 2 or not np.isfinite(values).all():
        return Interval(float(np.mean(values)), math.nan)
    quantile = float(stats.t.ppf(0.5 + confidence / 2, len(values) - 1))
    return Interval(float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values)))


def shown(value: Interval, digits: int) -> str:
    """As ``3.21 ± 0.02``."""
    if math.isnan(value.half):
        return f"{value.mean:.{digits}f}"
    return f"{value.mean:.{digits}f} ± {value.half:.{digits}f}"


def marked(value: Interval) -> str:
    """A difference, to three digits; bold where the interval is not around 0."""
    sure = not math.isnan(value.half) and not value.low <= 0 <= value.high
    return f"**{shown(value, 3)}**" if sure else shown(value, 3)


def seeds_told(count: int) -> str:
    """How many seeds, in words that say what one of them is worth."""
    return f"{count} seeds" if count > 1 else "one seed, so that there is no interval and a difference may be chance"
