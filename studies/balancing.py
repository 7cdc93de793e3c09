"""What the tokens are over which experts are balanced: a sequence, a micro-batch or the whole batch?

    python -m studies.balancing [--short | --large] [--at-once N] [--report]

Qiu et al. (ACL 2025, arXiv 2501.11873) find that the load-balancing loss of a micro-batch makes every few sequences use
all experts alike, whatever they are about, and that the loss falls and experts specialise when the frequencies are
those of the global batch. Here the text has three domains (code, documentation, C++ headers); the balance batch, the
sequences that the frequencies are of, goes from one sequence to the global batch, at two coefficients; without any
balancing and with the selection bias in place of a loss besides. All train on the same batches in the same order from
the same weights as the others of their seed, so differences are taken seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from . import common
from .common import (
    Curve,
    Interval,
    Plot,
    Run,
    Trainings,
    interval,
    marked,
    seed_by_seed,
    seeds_told,
    shown,
    table,
    verdict,
)
from .common.command import known_runs, study_command
from .common.runs import model_of, parameters_of, prepare_data
from .common.trainings import WIDE_ON_A_GPU
from .headers import prepare_headers

DOMAINS = ("code", "docs", "headers")
MIXTURE: dict[str, Any] = {
    "data.sources.code.weight": 0.4,
    "data.sources.docs.weight": 0.3,
    "data.sources.headers": {"path": "data/studies_headers", "domain": "headers", "weight": 0.3},
}
MEASURES = {"imbalance": 2, "load_cv": 2, "dead": 1, "specialization": 3}
"""Of the routing, each with the digits that the table shows."""


class Way(NamedTuple):
    """A way of balancing."""

    kind: str
    """``none``, ``loss`` or ``bias``."""
    coefficient: float = 0.0
    """Of the loss; of the bias its rate."""
    batch: int = 0
    """Sequences that the frequencies of the loss are of."""

    def overrides(self, size: Size) -> dict[str, Any]:
        """Of the configuration. A balance batch between a sequence and the global batch is a micro-batch."""
        if self.kind == "none":
            return {}
        if self.kind == "bias":
            return {"model.experts.selection_bias": True, "objective.balancing.bias": {"rate": self.coefficient}}
        between = 1 < self.batch < size.batch
        level = "micro_batch" if between else "sequence" if self.batch == 1 else "global_batch"
        loss = {"kind": "load_balance", "level": level, "coefficient": self.coefficient}
        return {
            "objective.balancing.losses": [loss],
            **({"training.micro_batch": self.batch} if between else {}),
        }

    @property
    def name(self) -> str:
        return {"none": "none", "bias": "selection bias"}.get(self.kind, f"loss, {self.coefficient:g}")


NONE = Way("none")


@dataclass(frozen=True)
class Size(Trainings):
    """How much of it is run."""

    balance_batches: tuple[int, ...] = (1, 4, 32)
    """The last is the global batch."""
    coefficients: tuple[float, ...] = (0.01, 0.1)
    bias_rate: float = 0.001
    experts: Mapping[str, Any] = field(default_factory=lambda: {"number": 16, "top_k": 2, "intermediate_size": 64})
    _: KW_ONLY
    lr_from: str = "the better for the global batch at 0.01 of 0.008 and 0.016 with seed 100"

    @property
    def batch(self) -> int:
        """Sequences of an optimizer step."""
        return self.balance_batches[-1]

    @property
    def ways(self) -> list[Way]:
        losses = [Way("loss", each, batch) for each in self.coefficients for batch in self.balance_batches]
        return [NONE, *losses, Way("bias", self.bias_rate)]


SIZES = {
    "default": Size(300, 5),
    "short": Size(20, 2, (1, 8), (0.1,), warmup=5),
    # for one GPU
    "large": Size(
        4000,
        5,
        (1, 4, 16, 64, 256),
        warmup=200,
        lr=0.001,
        lr_from="not tuned",
        experts={"number": 64, "top_k": 4, "intermediate_size": 256, "shared": 1},
        overrides={
            **WIDE_ON_A_GPU,
            "data.sources.headers": {**MIXTURE["data.sources.headers"], "max_epochs": None},
        },
    ),
}


def runs(size: Size) -> list[Run]:
    """All runs, seed by seed: a study that is stopped has whole seeds."""
    return [
        Run(
            {**way._asdict(), "seed": seed},
            {
                **MIXTURE,
                **size.settings(seed, size.batch, size.steps // 5),
                "model.experts": dict(size.experts),
                **way.overrides(size),
            },
        )
        for seed in range(1, size.seeds + 1)
        for way in size.ways
    ]


def chosen(results: Sequence[dict[str, Any]], way: Way) -> list[dict[str, Any]]:
    """The runs of this way, by seed."""
    return common.chosen(results, **way._asdict())


def heldout(result: Mapping[str, Any], domains: Sequence[str] = DOMAINS) -> float:
    """The last held-out loss, a mean over domains; infinite where the run diverged."""
    if "heldout_loss" not in result:
        return math.inf
    return float(np.mean([result["evaluations"][-1][f"domain_loss/{domain}"] for domain in domains]))


def difference(results: Sequence[dict[str, Any]], one: Way, other: Way, domains: Sequence[str] = DOMAINS) -> Interval:
    """Of the held-out losses of two ways, seed by seed: below 0, the first is better."""
    return seed_by_seed(chosen(results, one), chosen(results, other), lambda result: heldout(result, domains))


def measure(results: Sequence[dict[str, Any]], way: Way, name: str) -> Interval:
    """Of the routing in the last tenth of the steps."""
    return interval([each["experts"][name] for each in chosen(results, way)])


def ways_table(results: Sequence[dict[str, Any]], size: Size) -> str:
    rows = []
    for way in size.ways:
        losses = (
            [shown(interval([heldout(each, domains) for each in chosen(results, way)]), 3) for domains in _columns()]
            if way == NONE
            else [marked(difference(results, way, NONE, domains)) for domains in _columns()]
        )
        routing = [shown(measure(results, way, name), digits) for name, digits in MEASURES.items()]
        rows.append([way.name, str(way.batch or ""), *losses, *routing])
    header = ["balancing", "balance batch", "mean", *DOMAINS, "busiest / mean", "CV of loads", "dead", "specialization"]
    return table(header, rows)


def _columns() -> list[tuple[str, ...]]:
    return [DOMAINS, *((domain,) for domain in DOMAINS)]


def conclusion(results: Sequence[dict[str, Any]], size: Size) -> str:
    """At each coefficient, what the global batch gives over the smaller balance batches."""
    lines = []
    for coefficient in size.coefficients:
        whole = Way("loss", coefficient, size.batch)
        told = []
        for batch in size.balance_batches[:-1]:
            value = difference(results, whole, Way("loss", coefficient, batch))
            told.append(
                f"{verdict(value)} than with {batch} ({shown(value, 3)})".replace("apart than with", "apart from")
            )
        special = ", ".join(
            f"{measure(results, Way('loss', coefficient, batch), 'specialization').mean:.3f} ({batch})"
            for batch in size.balance_batches
        )
        lines.append(f"- coefficient {coefficient:g}: the global batch is {', '.join(told)}; specialization {special};")
    return "\n".join(lines).removesuffix(";") + "."


def report(results: Sequence[dict[str, Any]], size: Size) -> tuple[str, list[Plot]]:
    """The section of docs/studies.md, and the plots."""
    seeds = len({each["seed"] for each in results})
    shape = {**size.model_settings(), "model.experts": dict(size.experts)}
    model, count = model_of(shape), parameters_of(shape)
    text = f"""## Balancing experts over a sequence, a micro-batch or the global batch

Held-out loss, nats per token, after {size.steps} steps of {size.batch} sequences of 128 tokens of three domains (40 %
code and 30 % documentation of Python's standard library, 30 % C++ headers of torch); {seeds_told(seeds)}; one learning
rate ({size.lr:g}, {size.lr_from}). {len(model.expert_layers)} blocks of {model.experts.number if model.experts else 0}
experts, of which a token goes to {model.experts.top_k if model.experts else 0}: {count.total / 1e6:.2f}M parameters,
{count.active / 1e6:.2f}M of them active. The balance batch is the sequences that a loss's frequencies are of: 1 is the
level `sequence`, {size.batch} is `global_batch` (exact), between them `micro_batch`. The first row has losses, the
others differences to it, seed by seed on the same batches: below 0 is better, bold where the 95 % interval is not
around 0. Of {len(_columns()) * (len(size.ways) - 1)} comparisons one in twenty is bold by chance. The routing is that
of the whole step, a mean over the blocks and the last tenth of the steps: the busiest
expert's load over the mean, the loads' coefficient of variation, experts without a token (of all blocks together), and
the specialization, I(domain; expert) / H(domain), from 0 to 1.

The paper (3.4B to 43B parameters, 120B tokens and more; balance batches of 4 to 512 sequences) finds the loss to fall
as the balance batch grows, and experts to specialise only then. This is the beginning of the training of a tiny model,
on {size.steps * size.batch * 128 / 1e6:.1f}M tokens:

{conclusion(results, size)}

{ways_table(results, size)}
"""
    plots = []
    drawn: list[tuple[str, str, Callable[[Way], Interval]]] = [
        ("held-out loss less that without balancing", "nats per token", lambda way: difference(results, way, NONE)),
        ("coefficient of variation of the loads", "", lambda way: measure(results, way, "load_cv")),
        ("specialization", "I(domain; expert) / H(domain)", lambda way: measure(results, way, "specialization")),
    ]
    for title, axis, value in drawn:
        curves = []
        for coefficient in size.coefficients:
            values = [value(Way("loss", coefficient, batch)) for batch in size.balance_batches]
            curves.append(Curve.of(f"coefficient {coefficient:g}", size.balance_batches, values))
        plots.append(Plot(title, "balance batch, sequences", axis, curves, log_x=True))
    return text, plots


def main() -> None:
    study_command("balancing", __doc__, SIZES, known_runs(runs, prepare_data, prepare_headers), report)


if __name__ == "__main__":
    main()
