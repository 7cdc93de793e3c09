"""Does the best learning rate stay where it is when the model gets wider? With muP and without, on real text.

    python -m studies.lr_transfer [--short | --large] [--at-once N] [--report]

muP's claim (Yang et al. 2022, arXiv 2203.03466, figure 1): the loss after a fixed number of steps has its minimum at
the same learning rate for every width, and a wider model is never worse; in the standard parametrisation the best rate
falls as the width grows. The narrowest width is the base shape, where both are one model. A head has as many features
at every width, so that the number of heads grows; the decay, the schedule, the batch and the depth stay.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import common
from .common import Curve, Interval, Plot, Run, final_loss, interval, shown, table
from .common.command import known_runs, study_command
from .common.runs import prepare_data

STANDARD, MUP = "standard", "muP"


@dataclass(frozen=True)
class Size:
    """How much of it is run."""

    widths: tuple[int, ...]
    rates: tuple[float, ...]
    """Powers of two."""
    seeds: int
    head_dim: int = 16
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Of ``studies/base.yaml``."""

    def shape(self, width: int) -> dict[str, int]:
        """The model's widths, all in proportion."""
        return {"hidden_size": width, "heads": width // self.head_dim, "intermediate_size": width * 11 // 4}

    @property
    def steps(self) -> int:
        return int(self.overrides.get("training.steps", 150))

    @property
    def layers(self) -> int:
        return int(self.overrides.get("model.layers", 2))


def powers(first: int, last: int) -> tuple[float, ...]:
    return tuple(2.0**power for power in range(first, last + 1))


SIZES = {
    "default": Size((32, 64, 128), powers(-9, -4), 3),
    "short": Size(
        (32, 64),
        powers(-9, -6),
        2,
        overrides={"training.steps": 30, "schedule.warmup_steps": 5, "evaluation.every_steps": 30},
    ),
    # for one GPU
    "large": Size(
        (128, 256, 512, 1024, 2048),
        powers(-12, -5),
        5,
        head_dim=64,
        overrides={
            "training.steps": 1000,
            "training.global_batch": 64,
            "training.micro_batch": 64,
            "training.precision": "bf16",
            "model.layers": 4,
            "schedule.warmup_steps": 100,
            "evaluation.every_steps": 1000,
            "data.sources.code.max_epochs": None,
            "data.sources.docs.max_epochs": None,
        },
    ),
}


def runs(size: Size) -> list[Run]:
    """All runs, seed by seed: a study that is stopped has whole seeds. At the base width there is one model."""
    base = size.widths[0]
    return [
        Run(
            {"width": width, "parametrisation": name, "lr": rate, "seed": seed},
            {
                **size.overrides,
                **{f"model.{key}": value for key, value in size.shape(width).items()},
                **({"model.mup.base": size.shape(base)} if name == MUP else {}),
                "optimizer.lr": rate,
                "run.seed": seed,
            },
        )
        for seed in range(1, size.seeds + 1)
        for width in reversed(size.widths)
        for name in ((STANDARD, MUP) if width != base else (STANDARD,))
        for rate in size.rates
    ]


def chosen(results: Sequence[dict[str, Any]], width: int, name: str, rate: float) -> list[dict[str, Any]]:
    """The runs of these, by seed; those of the base width are both parametrisations'."""
    base = min(each["width"] for each in results)
    name = STANDARD if width == base else name
    return common.chosen(results, width=width, parametrisation=name, lr=rate)


def losses(results: Sequence[dict[str, Any]], width: int, name: str, rate: float) -> list[float]:
    """The held-out loss of every seed, infinite where the run diverged."""
    return [final_loss(each) for each in chosen(results, width, name, rate)]


def best_rate(rates: Sequence[float], values: NDArray[np.float64]) -> float:
    """log2 of the rate at the minimum: of the parabola through the best point and its neighbours.

    At an end of the grid, or beside a run that diverged, it is the best point's own.
    """
    place = int(np.argmin(values))
    if not 0 < place < len(rates) - 1 or not np.isfinite(values[place - 1 : place + 2]).all():
        return math.log2(rates[place])
    before, at, after = values[place - 1 : place + 2]
    return math.log2(rates[place]) + float(0.5 * (before - after) / (before - 2 * at + after))


@dataclass(frozen=True)
class Summary:
    """What the runs of one parametrisation say; intervals over the seeds."""

    best: dict[int, Interval]
    """log2 of the best learning rate, for each width."""
    lowest: dict[int, Interval]
    """Loss at the best rate of the grid, of each width."""
    carried: dict[int, Interval]
    """Loss at the rate that was best for the base width."""
    wider_is_better: float
    """At that rate: share of all pairs of neighbouring widths and parts of the run (but the first part) in which the
    training loss of the wider model, a mean over the seeds, is not above that of the narrower one."""
    slope: Interval
    """Of log2 of the best rate against log2 of the width: 0 where it transfers."""


def summarise(results: Sequence[dict[str, Any]], size: Size, name: str) -> Summary:
    grid = {
        width: np.array([losses(results, width, name, rate) for rate in size.rates]) for width in size.widths
    }  # [rates, seeds]
    best = {w: [best_rate(size.rates, of_seed) for of_seed in grid[w].T] for w in size.widths}
    base_place = int(np.argmin(grid[size.widths[0]].mean(axis=1)))
    logs = np.log2(size.widths)
    rate = size.rates[base_place]
    curves = [np.mean([each["curve"][1:] for each in chosen(results, w, name, rate)], axis=0) for w in size.widths]
    slopes = [float(np.polyfit(logs, found, 1)[0]) for found in zip(*(best[w] for w in size.widths), strict=True)]
    return Summary(
        best={w: interval(best[w]) for w in size.widths},
        lowest={w: interval(list(grid[w][int(np.argmin(grid[w].mean(axis=1)))])) for w in size.widths},
        carried={w: interval(list(grid[w][base_place])) for w in size.widths},
        wider_is_better=float(np.mean([wide <= narrow for narrow, wide in itertools.pairwise(curves)])),
        slope=interval(slopes),
    )


def report(results: Sequence[dict[str, Any]], size: Size) -> tuple[str, list[Plot]]:
    """The section of docs/studies.md, and the plots."""
    summaries = {name: summarise(results, size, name) for name in (STANDARD, MUP)}
    rows = [
        [
            str(width),
            *(
                cell
                for name in (STANDARD, MUP)
                for cell in (
                    shown(summaries[name].best[width], 2),
                    shown(summaries[name].lowest[width], 3),
                    shown(summaries[name].carried[width], 3),
                )
            ),
        ]
        for width in size.widths
    ]
    columns = ("log2 of the best rate", "loss there", "loss at the base width's best rate")
    header = ["width", *(f"{name}: {column}" for name in (STANDARD, MUP) for column in columns)]
    slopes = " and ".join(f"{shown(summaries[name].slope, 2)} ({name})" for name in (STANDARD, MUP))
    better = " and ".join(f"{100 * summaries[name].wider_is_better:.0f} % ({name})" for name in (STANDARD, MUP))
    seeds = len({each["seed"] for each in results})
    text = f"""## Learning rate against width, with and without muP

Held-out loss, nats per token, after {size.steps} steps of a decoder of {size.layers} blocks on the text of Python's
standard library; {seeds} seeds, rates in steps of two from 2^{math.log2(size.rates[0]):.0f} to
2^{math.log2(size.rates[-1]):.0f}; the best rate is that of a parabola through the best three. The slope of its
logarithm against that of the width is {slopes}; the paper expects 0 with muP. The standard parametrisation has one
`init_std` for all widths.

Wider is better, the paper says: at the base width's best rate, the training loss of a model is not above that of the
next narrower one in {better} of all parts of the runs.

{table(header, rows)}
"""
    curves = {
        name: [
            Curve.of(
                f"width {width}",
                list(size.rates),
                [interval(losses(results, width, name, rate)) for rate in size.rates],
                colour=place,
            )
            for place, width in enumerate(size.widths)
        ]
        for name in (STANDARD, MUP)
    }
    plots = [Plot(name, "learning rate", "held-out loss, nats per token", curves[name], log_x=True) for name in curves]
    return text, plots


def main() -> None:
    study_command("lr_transfer", __doc__, SIZES, known_runs(runs, prepare_data), report)


if __name__ == "__main__":
    main()
