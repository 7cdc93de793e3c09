"""Does loss-based reweighting of the sequences lower the held-out loss? On clean text, and with a fifth of noise.

    python -m studies.reweighting [--short | --large] [--at-once N] [--report]

Sow et al. (ICLR 2025, arXiv 2502.06733) weigh the sequences of a batch by their loss and find LinUpper, which weighs
low losses down, best. Here every strategy at several temperatures r trains on the same batches in the same order from
the same weights as uniform weighting with the same seed, so differences are taken seed by seed. A group is the whole
batch (``micro_step`` with one micro-step); nothing is reweighted during the warm-up of the learning rate, which is
chosen for uniform weights and kept. With noise, a fifth of the sequences come from studies/noise.py's documents; the
loss on held-out noise is told apart from that on the clean domains.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from . import common
from .common import (
    Curve,
    Interval,
    Plot,
    Run,
    Trainings,
    Verdict,
    interval,
    marked,
    seed_by_seed,
    shown,
    table,
    verdict,
)
from .common.command import known_runs, study_command
from .common.runs import parameters_of, prepare_data
from .common.trainings import WIDE_ON_A_GPU
from .noise import prepare_noise

UNIFORM = ("uniform", math.inf)
CLEAN, NOISE = ("code", "docs"), "noise"
MIXTURES: dict[str, dict[str, Any]] = {
    "clean": {},
    "noise": {
        "data.sources.code.weight": 0.48,
        "data.sources.docs.weight": 0.32,
        "data.sources.noise": {"path": "data/studies_noise", "domain": "noise", "weight": 0.2},
    },
}
DRAWN = {"clean": "40 %", "noise": "20 %"}
"""Share of the sequences of the last domain of a table."""

Method = tuple[str, float]
"""A strategy and its r."""


@dataclass(frozen=True)
class Size(Trainings):
    """How much of it is run."""

    temperatures: tuple[float, ...] = (0.4, 1.0)
    strategies: tuple[str, ...] = ("linupper", "quadratic", "extremes")
    batch: int = 16
    evaluations: int = 10
    _: KW_ONLY
    warmup: int = 15
    lr_from: str = "the best for uniform weights of 0.008, 0.016 and 0.032 with seed 1"

    @property
    def methods(self) -> list[Method]:
        return [UNIFORM, *itertools.product(self.strategies, self.temperatures)]


SIZES = {
    "default": Size(150, 5),
    "short": Size(20, 2, (0.4,), ("linupper",), warmup=5, evaluations=4),
    # for one GPU
    "large": Size(
        4000,
        5,
        (0.4, 1.0, 2.0),
        batch=64,
        warmup=200,
        evaluations=40,
        lr=0.001,
        lr_from="not tuned",
        overrides=WIDE_ON_A_GPU,
    ),
}


def runs(size: Size) -> list[Run]:
    """All runs, seed by seed: a study that is stopped has whole seeds."""
    found = []
    for seed, mixture, (strategy, r) in itertools.product(range(1, size.seeds + 1), MIXTURES, size.methods):
        overrides: dict[str, Any] = {
            **size.settings(seed, size.batch, size.steps // size.evaluations),
            **MIXTURES[mixture],
            "evaluation.sequences": 64,
            "objective.average": "sequence",
        }
        if size.overrides.get("data.sources.code.max_epochs", 1) is None and mixture == "noise":
            overrides["data.sources.noise"] = {**overrides["data.sources.noise"], "max_epochs": None}
        if strategy != "uniform":
            overrides |= {
                "objective.reweighting.strategy": strategy,
                "objective.reweighting.temperature": r,
                "objective.reweighting.start_step": size.warmup,
            }
        labels = {"data": mixture, "strategy": strategy, **({} if math.isinf(r) else {"r": r}), "seed": seed}
        found.append(Run(labels, overrides))
    return found


def chosen(results: Sequence[dict[str, Any]], mixture: str, method: Method) -> list[dict[str, Any]]:
    """The runs of these, by seed."""
    strategy, r = method
    return common.chosen(results, data=mixture, strategy=strategy, r=None if math.isinf(r) else r)


def curve(result: Mapping[str, Any], domains: Sequence[str]) -> list[float]:
    """The held-out loss at every evaluation, a mean over domains; infinite at the end of a run that diverged."""
    found = [float(np.mean([line[f"domain_loss/{domain}"] for domain in domains])) for line in result["evaluations"]]
    return found if "heldout_loss" in result else [*found[:-1], math.inf]


def differences(
    results: Sequence[dict[str, Any]], mixture: str, method: Method, domains: Sequence[str], evaluation: int = -1
) -> Interval:
    """Of the loss to that of the uniform run with the same seed, at an evaluation: below 0 is better."""
    pairs = chosen(results, mixture, method), chosen(results, mixture, UNIFORM)
    return seed_by_seed(*pairs, lambda result: curve(result, domains)[evaluation])


def steps_to_reach(steps: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """Where the line through the points first comes down to ``target``; None where it never does."""
    for number, loss in enumerate(losses):
        if loss <= target:
            if not number:
                return float(steps[0])
            before = losses[number - 1]
            share = (before - target) / (before - loss)
            return steps[number - 1] + share * (steps[number] - steps[number - 1])
    return None


def reaching(results: Sequence[dict[str, Any]], mixture: str, method: Method) -> list[float | None]:
    """For each seed, the steps to the clean loss that the uniform run of the seed ends with."""
    found = []
    for one, uniform in zip(chosen(results, mixture, method), chosen(results, mixture, UNIFORM), strict=True):
        steps = [line["step"] for line in one["evaluations"]]
        found.append(steps_to_reach(steps, curve(one, CLEAN), curve(uniform, CLEAN)[-1]))
    return found


def shown_steps(steps: Sequence[float | None]) -> str:
    """Their mean where every seed gets there, else how many do."""
    there = [step for step in steps if step is not None]
    return shown(interval(there), 0) if len(there) == len(steps) else f"{len(there)} of {len(steps)} seeds"


def mixture_table(results: Sequence[dict[str, Any]], size: Size, mixture: str) -> str:
    domains = [*CLEAN, *([NOISE] if mixture == "noise" else [])]
    watched = domains[-1]
    rows = []
    for method in size.methods:
        found = chosen(results, mixture, method)
        if method == UNIFORM:
            cells = [shown(interval([curve(each, [domain])[-1] for each in found]), 3) for domain in domains]
            share = f"{DRAWN[mixture]} (as drawn)"
        else:
            cells = [marked(differences(results, mixture, method, [domain])) for domain in domains]
            share = f"{100 * np.mean([each['shares'][watched] for each in found]):.0f} %"
        name, r = method
        rows.append([
            name, "" if math.isinf(r) else f"{r:g}", *cells, shown_steps(reaching(results, mixture, method)), share,
        ])  # fmt: skip
    header = ["strategy", "r", *domains, "steps to uniform's last loss", f"weight of {watched}"]
    return table(header, rows)


def conclusion(results: Sequence[dict[str, Any]], size: Size, mixture: str) -> str:
    """Which methods differ from uniform in the mean loss of the clean domains."""
    groups: dict[Verdict, list[str]] = {"better": [], "worse": [], "not told apart": []}
    for method in size.methods[1:]:
        value = differences(results, mixture, method, CLEAN)
        groups[verdict(value)].append(f"{method[0]} at r = {method[1]:g} ({shown(value, 3)})")
    names = ("better than uniform", "worse", "not told apart from it")
    parts = zip(names, groups.values(), strict=True)
    return "; ".join(f"{name}: {', '.join(group) or 'none'}" for name, group in parts)


def report(results: Sequence[dict[str, Any]], size: Size) -> tuple[str, list[Plot]]:
    """The section of docs/studies.md, and the plots."""
    seeds = len({each["seed"] for each in results})
    parameters = parameters_of(size.model_settings()).total
    text = f"""## Reweighting of sequences by their loss

Held-out loss, nats per token, after {size.steps} steps of {size.batch} sequences of 128 tokens, on the text of
Python's standard library; {seeds} seeds, one learning rate ({size.lr:g}, {size.lr_from}),
reweighting from step {size.warmup} on. The row of uniform has losses; the others have differences to it, seed by seed
on the same batches: below 0 is better, bold where the 95 % interval is not around 0. With
{2 * (len(size.methods) - 1)} comparisons of each domain, one in twenty is bold by chance. The steps are those to the
loss (mean of code and docs) with which uniform ends. The last column is the share of the weight, over the reweighted
steps, that the named domain got.

This is the beginning of the training of a model of {parameters / 1e6:.2f}M parameters, on
{size.steps * size.batch * 128 / 1e6:.1f}M tokens. The paper's have 124M and more, and its gains are said to grow with
the size. The rate is that of uniform weights for all; weights make a batch of {size.batch} smaller in effect (r = 0.4
more than r = 1), which another rate or a larger batch might make up for.

The paper expects LinUpper to be the best. In the mean of code and docs:

- on clean text: {conclusion(results, size, "clean")};
- with a fifth of noise: {conclusion(results, size, "noise")}.

On clean text:

{mixture_table(results, size, "clean")}

With a fifth of the sequences from documents of noise (shuffled characters, shuffled words, repeated boilerplate,
base64; studies/noise.py):

{mixture_table(results, size, "noise")}
"""
    plots = []
    for mixture in MIXTURES:
        steps = [line["step"] for line in chosen(results, mixture, UNIFORM)[0]["evaluations"]]
        curves = []
        for place, method in enumerate(size.methods[1:]):
            values = [differences(results, mixture, method, CLEAN, number) for number in range(len(steps))]
            curves.append(Curve.of(f"{method[0]}, r = {method[1]:g}", steps, values, colour=place))
        plots.append(Plot(f"{mixture}: loss on code and docs less uniform's", "step", "nats per token", curves))
    return text, plots


def main() -> None:
    study_command("reweighting", __doc__, SIZES, known_runs(runs, prepare_data, prepare_noise), report)


if __name__ == "__main__":
    main()
