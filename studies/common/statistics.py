"""Means over seeds with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

Result = Mapping[str, Any]
"""What is known of one run."""
Verdict = Literal["better", "worse", "not told apart"]


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


def chosen(results: Iterable[dict[str, Any]], **labels: Any) -> list[dict[str, Any]]:
    """The runs with these labels, by seed; None stands for a label that a run lacks."""
    found = [each for each in results if all(each.get(name) == value for name, value in labels.items())]
    return sorted(found, key=lambda each: int(each["seed"]))


def seed_by_seed(ones: Sequence[Result], others: Sequence[Result], value: Callable[[Result], float]) -> Interval:
    """Of the differences of a value between runs of the same seeds in the same order."""
    return interval([value(one) - value(other) for one, other in zip(ones, others, strict=True)])


def final_loss(result: Result, which: str = "heldout_loss") -> float:
    """At the end; infinite where the run diverged."""
    return float(result.get(which, math.inf))


def verdict(difference: Interval) -> Verdict:
    """What a difference of losses says; nothing where the interval is around 0, or is none."""
    return "better" if difference.high < 0 else "worse" if difference.low > 0 else "not told apart"


def shown(value: Interval, digits: int) -> str:
    """As ``3.21 ± 0.02``."""
    if math.isnan(value.half):
        return f"{value.mean:.{digits}f}"
    return f"{value.mean:.{digits}f} ± {value.half:.{digits}f}"


def marked(value: Interval) -> str:
    """A difference, to three digits; bold where the interval is not around 0."""
    return shown(value, 3) if verdict(value) == "not told apart" else f"**{shown(value, 3)}**"


def seeds_told(count: int) -> str:
    """How many seeds, in words that say what one of them is worth."""
    return f"{count} seeds" if count > 1 else "one seed, so that there is no interval and a difference may be chance"
