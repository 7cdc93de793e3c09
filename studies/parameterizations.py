"""What do low-rank and sparse linear layers cost, and what loss do they reach, beside a dense model on as many tokens?

    python -m studies.parameterizations [--short | --large] [--at-once N] [--report]

Every way has its learning rate tuned: on one seed, in steps of two, the grid growing until the best rate has a worse
neighbour on both sides. The losses are those of other seeds at that rate; each has the same batches for all, so
differences are taken seed by seed. LOST (arXiv 2508.02668) has its two ablations beside it: columns at random, and
gamma = 1, which has none. Dense has two further starts beside it, as ``init_std`` decides much at so few steps. Ranks
are a quarter of the width, as CoLA's. Costs are studies/parameterization_costs.py's.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.errors import UserError
from pretrain.config import load_config

from .common import Curve, Interval, Plot, Run, final_loss, interval, shown, table, verdict
from .common.command import Do, Results, study_command
from .common.runs import BASE, RESULTS, VOCABULARY, arguments, commit, model_of, prepare_data, whole_seeds
from .common.trainings import ON_A_GPU
from .parameterization_costs import Cost, measure

DENSE, LOST = "dense", "lost"
TUNING_SEED = 1
COSTS = RESULTS / "parameterizations_costs.json"


@dataclass(frozen=True)
class Size:
    """How much of it is run."""

    width: int
    heads: int
    steps: int
    batch: int
    seeds: int
    """Besides the one that rates are tuned on."""
    rates: tuple[int, ...] = (-7, -6, -5)
    """Powers of two that tuning begins with."""
    warmup: int = 15
    turns: int = 40
    """Steps whose time is taken."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Of ``studies/base.yaml``."""

    @property
    def rank(self) -> int:
        return self.width // 4


SIZES = {
    "default": Size(96, 6, 150, 8, 4),
    "short": Size(32, 2, 10, 8, 2, warmup=2, turns=3),
    # for one GPU
    "large": Size(
        768,
        12,
        4000,
        64,
        4,
        (-11, -10, -9),
        warmup=200,
        overrides={**ON_A_GPU, "model.layers": 12},
    ),
}


def variants(size: Size) -> dict[str, dict[str, Any]]:
    """What each of the ways overrides; dense comes first."""
    rank = size.rank
    # the papers' 1 % of the columns would be less than one of the default size
    lost = {"kind": "lost", "rank": rank, "column_fraction": 0.05}
    layers: dict[str, dict[str, Any]] = {
        "low_rank": {"kind": "low_rank", "rank": rank},
        "cola": {"kind": "cola", "rank": rank},
        "sltrain": {"kind": "sltrain", "rank": rank, "alpha": rank / 4},
        LOST: lost,
        "lost, random columns": {**lost, "columns": "random"},
        "lost, gamma 1": {"kind": "lost", "rank": rank, "gamma": 1.0},
    }
    galore = {"optimizer.kind": "galore", "optimizer.rank": rank, "optimizer.gap": size.steps // 3}
    std = model_of(size.overrides).init_std
    starts = {
        "dense, half init_std": {"model.init_std": std / 2},
        "dense, quarter init_std": {"model.init_std": std / 4},
    }
    return {DENSE: {}, **starts, **{name: {"model.linear": [rule]} for name, rule in layers.items()}, "galore": galore}


def overrides_of(size: Size, variant: str) -> dict[str, Any]:
    """All that a run of it has over ``studies/base.yaml``, besides rate and seed."""
    return {
        **size.overrides,
        "model.hidden_size": size.width,
        "model.heads": size.heads,
        "model.intermediate_size": size.width * 11 // 4,
        "training.steps": size.steps,
        "training.global_batch": size.batch,
        "training.micro_batch": size.batch,
        "schedule.warmup_steps": size.warmup,
        "evaluation.every_steps": size.steps,
        "optimizer.weight_decay": 0.0,
        **variants(size)[variant],
    }


def run_of(size: Size, variant: str, power: int, seed: int) -> Run:
    """A run with the rate 2 ** ``power``."""
    labels = {"variant": variant.replace(", ", "_").replace(" ", "_"), "power": power, "seed": seed}
    return Run(labels, {**overrides_of(size, variant), "optimizer.lr": 2.0**power, "run.seed": seed})


def tune(size: Size, do: Do) -> dict[str, dict[int, float]]:
    """For each way the loss at each power of two that was tried; the best one has both neighbours.

    Raises:
        UserError: runs are missing, with ``--report``.
    """
    tried: dict[str, list[int]] = {name: list(size.rates) for name in variants(size)}
    while True:
        runs = {name: [run_of(size, name, power, TUNING_SEED) for power in powers] for name, powers in tried.items()}
        found = do([run for of_one in runs.values() for run in of_one])
        if len(found) < sum(len(of_one) for of_one in runs.values()):
            raise UserError("the learning rates are not tuned yet. Run the study without --report.")
        losses = {(each["variant"], each["power"]): final_loss(each) for each in found}
        tuned = {
            name: {run.labels["power"]: losses[run.labels["variant"], run.labels["power"]] for run in of_one}
            for name, of_one in runs.items()
        }
        wider = {name: powers for name, of_one in tuned.items() if (powers := next_powers(of_one)) != tried[name]}
        if not wider:
            return tuned
        tried |= wider


def best(losses: Mapping[int, float]) -> int:
    return min(losses, key=lambda power: losses[power])


def next_powers(losses: Mapping[int, float]) -> list[int]:
    """The powers that were tried, and one more where the best is at an end."""
    powers, at = sorted(losses), best(losses)
    if at == powers[0]:
        return [at - 1, *powers]
    return [*powers, at + 1] if at == powers[-1] else powers


@dataclass(frozen=True)
class Found:
    """What the study knows."""

    tuned: dict[str, dict[int, float]]
    finals: dict[str, list[float]]
    """For each way the losses of the seeds, in one order."""
    costs: dict[str, Cost]

    @property
    def best_dense(self) -> str:
        """The dense model with the lowest mean of its losses."""
        dense = [name for name in self.finals if name.startswith(DENSE)]
        return min(dense, key=lambda name: sum(self.finals[name]))

    def difference(self, one: str, other: str) -> Interval:
        """Of the losses of two ways, seed by seed."""
        return interval([a - b for a, b in zip(self.finals[one], self.finals[other], strict=True)])


def collect(size: Size, do: Do) -> tuple[Found, str]:
    prepare_data()
    tuned = tune(size, do)
    seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + size.seeds)
    runs = [run_of(size, name, best(tuned[name]), seed) for seed in seeds for name in tuned]
    results, missing = whole_seeds(runs, do(runs))
    return Found(tuned, finals(results, size), costs(size)), missing


def finals(results: Results, size: Size) -> dict[str, list[float]]:
    ordered = sorted(results, key=lambda each: int(each["seed"]))
    names = {name: run_of(size, name, 0, 0).labels["variant"] for name in variants(size)}
    return {name: [final_loss(each) for each in ordered if each["variant"] == label] for name, label in names.items()}


def costs(size: Size) -> dict[str, Cost]:
    """Measured in a process of their own, once for each size; kept with the commit."""
    given = {name: arguments(overrides_of(size, name)) for name in variants(size)}
    key = hashlib.sha256(json.dumps([BASE.read_text(), given, size.turns]).encode()).hexdigest()
    kept = json.loads(COSTS.read_text()) if COSTS.exists() else {}
    if key not in kept:
        configs = {name: load_config(BASE, of_one) for name, of_one in given.items()}
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            measured = process.submit(measure, configs, VOCABULARY, size.turns).result()
        kept[key] = {"commit": commit(), "costs": {name: cost._asdict() for name, cost in measured.items()}}
        COSTS.parent.mkdir(parents=True, exist_ok=True)
        COSTS.write_text(json.dumps(kept, indent=1) + "\n")
    return {name: Cost(**cost) for name, cost in kept[key]["costs"].items()}


def report(found: Found, size: Size) -> tuple[str, list[Plot]]:
    """The section of docs/studies.md, and the plots."""
    base, reference = found.costs[DENSE], found.best_dense
    std = model_of(size.overrides).init_std
    rows = []
    for name, cost in found.costs.items():
        apart = found.difference(name, reference)
        low, middle, high = cost.ratios
        rows.append([
            name,
            f"{cost.parameters / 1e6:.3f}",
            f"{cost.optimizer_bytes / 2**20:.2f}",
            f"{cost.peak_bytes / 2**20:.1f} ({cost.peak_bytes / base.peak_bytes:.2f})",
            "1" if name == DENSE else f"{middle:.2f} ({low:.2f} to {high:.2f})",
            f"2^{best(found.tuned[name])}",
            shown(interval(found.finals[name]), 3),
            "" if name == reference else f"{shown(apart, 3)}, {verdict(apart)}",
        ])  # fmt: skip
    ablations = [name for name in found.finals if name.startswith(f"{LOST},")]
    against = "; ".join(
        f"{name}: {shown(value, 3)}, {verdict(value)}"
        for name, value in ((name, found.difference(name, LOST)) for name in ablations)
    )
    header = [
        "", "M parameters", "MiB optimizer state", "MiB peak (ratio)", "time of a step, dense = 1 (quartiles)",
        "learning rate", "held-out loss", "less that of the best dense",
    ]  # fmt: skip
    seeds = len(found.finals[DENSE])
    text = f"""## Parameterizations of the linear layers

Held-out loss, nats per token, after {size.steps} steps of {size.batch} sequences of 128 tokens on the text of Python's
standard library: equal tokens for all. Width {size.width}, rank {size.rank}; the learning rate is tuned for each on one
seed, in steps of two; losses are of {seeds} other seeds, differences seed by seed. Optimizer state is computed. Peak is
the bytes of all tensors alive at once in a step; time is of {size.turns} steps in which all took turns in one process,
on CPUs the processor's. Neither carries over from models so small, whose step is mostly embedding, head and overhead:
benchmarks/results/parameterizations.md has both at 60M and 130M. GaLore decomposes every {size.steps // 3} steps, not
every 200, and its peak holds one decomposition.

So few steps tell how fast a way begins to learn, not what it reaches in the end. `init_std` is {std:g} for all, which
cola's start does not depend on, and for dense also a half and a quarter of that: differences are to the dense model
whose losses are lowest, {reference}, so that no other way is credited with a better start; some of the others
might gain from another `init_std` too. A rate tuned on one seed may lie at the edge of what is stable: a seed beyond it
makes a wide interval.

{table(header, rows)}

LOST's ablations, less LOST itself: {against}. They tell whether its sparse part
matters, and the choice of that part's columns.
"""
    axes: dict[str, Callable[[Cost], float]] = {
        "parameters": lambda cost: cost.parameters,
        "bytes of optimizer state": lambda cost: cost.optimizer_bytes,
        "peak bytes": lambda cost: cost.peak_bytes,
        "time of a step, dense = 1": lambda cost: cost.ratios[1],
    }
    y = "held-out loss, nats per token"
    plots = [
        Plot(f"loss against {axis}", axis, y, [
            Curve(name, [of(cost)], [at.mean], [at.half])
            for name, cost in found.costs.items()
            for at in (interval(found.finals[name]),)
        ])
        for axis, of in axes.items()
    ]  # fmt: skip
    tuning = [
        Curve(name, [2.0**power for power in sorted(losses)], [losses[power] for power in sorted(losses)])
        for name, losses in found.tuned.items()
    ]
    return text, [*plots, Plot("tuning", "learning rate", y, tuning, log_x=True)]


def main() -> None:
    study_command("parameterizations", __doc__, SIZES, collect, report)


if __name__ == "__main__":
    main()
