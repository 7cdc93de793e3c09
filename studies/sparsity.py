"""How far do more experts lower the loss, of which each token goes to as few as before?

    python -m studies.sparsity [--short | --large] [--at-once N] [--report]

A small family after Optimal Sparsity of MoE Language Models for Reasoning Tasks (Nakamura et al., ICLR 2026,
arXiv 2508.18672): widths d x experts E x experts of a token k at the same tokens, experts of 2 d features in all
blocks, load balancing over the global batch at 0.01 and the router's z-loss at 0.001. Total parameters grow with E,
active ones with k; sparsity is 1 - k / E. ``configs/sweeps/optimal_sparsity.yaml`` is the paper's family,
``optimal_sparsity_small.yaml`` one for an hour of a GPU; here the models are those of the other studies, so that
several seeds fit on a CPU. The paper's findings on tasks are out of reach of such models: this is about the training
and the held-out loss alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pretrain.model import ParameterCount

from . import common
from .common import (
    Curve,
    Interval,
    Plot,
    Run,
    Trainings,
    final_loss,
    interval,
    marked,
    seed_by_seed,
    seeds_told,
    shown,
    table,
)
from .common.command import known_runs, study_command
from .common.runs import parameters_of, prepare_data
from .common.trainings import ON_A_GPU

BALANCING = [
    {"kind": "load_balance", "level": "global_batch", "coefficient": 0.01},
    {"kind": "router_z", "coefficient": 0.001},
]
SEQUENCE_TOKENS = 128
LOSSES = {"train_loss": "training", "heldout_loss": "held-out"}

Shape = tuple[int, int, int]
"""d, E, k."""


@dataclass(frozen=True)
class Size(Trainings):
    """How much of it is run."""

    widths: tuple[int, ...] = (64,)
    experts: tuple[int, ...] = (4, 8, 16, 32)
    top_k: tuple[int, ...] = (2, 4)
    batch: int = 16
    head_dim: int = 16
    _: KW_ONLY
    lr_from: str = "that of the other studies, not tuned"

    @property
    def shapes(self) -> list[Shape]:
        """Of all models: with E = k, which is no mixture, too."""
        shapes = itertools.product(self.widths, self.top_k, self.experts)
        return [(width, experts, top_k) for width, top_k, experts in shapes if experts >= top_k]

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * SEQUENCE_TOKENS

    def model(self, shape: Shape) -> dict[str, Any]:
        """The overrides of the model's section."""
        width, experts, top_k = shape
        return {
            **self.model_settings(),
            "model.hidden_size": width,
            "model.heads": width // self.head_dim,
            "model.intermediate_size": 2 * width,
            "model.experts": {"number": experts, "top_k": top_k, "intermediate_size": 2 * width},
        }

    @cached_property
    def parameters(self) -> dict[Shape, ParameterCount]:
        """Of every model."""
        return {shape: parameters_of(self.model(shape)) for shape in self.shapes}


SIZES = {
    "default": Size(300, 3),
    "short": Size(20, 2, (32,), (4, 8), (2,), warmup=5),
    # for one GPU
    "large": Size(
        4000,
        3,
        (256, 512),
        (8, 16, 32, 64, 128),
        (2, 4, 8),
        batch=256,
        warmup=200,
        head_dim=64,
        lr=0.001,
        lr_from="not tuned",
        overrides=ON_A_GPU,
    ),
}


def runs(size: Size) -> list[Run]:
    """All runs, seed by seed: a study that is stopped has whole seeds."""
    return [
        Run(
            {"width": shape[0], "number": shape[1], "top_k": shape[2], "seed": seed},
            {
                **size.settings(seed, size.batch, size.steps),
                **size.model(shape),
                "objective.balancing.losses": BALANCING,
            },
        )
        for seed in range(1, size.seeds + 1)
        for shape in size.shapes
    ]


def chosen(results: Sequence[dict[str, Any]], shape: Shape) -> list[dict[str, Any]]:
    """The runs of this shape, by seed."""
    width, experts, top_k = shape
    return common.chosen(results, width=width, number=experts, top_k=top_k)


def loss(results: Sequence[dict[str, Any]], shape: Shape, which: str) -> Interval:
    """``train_loss`` or ``heldout_loss``; infinite where a seed diverged."""
    return interval([final_loss(each, which) for each in chosen(results, shape)])


def gain(results: Sequence[dict[str, Any]], shape: Shape, base: Shape, which: str) -> Interval:
    """Of the loss over that of another shape, seed by seed: below 0 is better."""
    return seed_by_seed(chosen(results, shape), chosen(results, base), lambda result: final_loss(result, which))


def family_table(results: Sequence[dict[str, Any]], size: Size) -> str:
    rows = []
    for shape in size.shapes:
        width, experts, top_k = shape
        count = size.parameters[shape]
        fewest = (width, size.experts[0], top_k)
        cv, dead = ([each["experts"][name] for each in chosen(results, shape)] for name in ("load_cv", "dead"))
        rows.append([
            str(width), str(top_k), str(experts), f"{1 - top_k / experts:.3f}", f"{count.total / 1e6:.2f}",
            f"{count.active / 1e6:.2f}", f"{size.tokens / count.total:.2f}",
            *(shown(loss(results, shape, which), 3) for which in LOSSES),
            *("" if shape == fewest else marked(gain(results, shape, fewest, which)) for which in LOSSES),
            f"{np.mean(cv):.2f}", f"{np.mean(dead):.1f}",
        ])  # fmt: skip
    header = [
        "d", "k", "E", "sparsity", "M total", "M active", "tokens / total",
        *(f"{name} loss" for name in LOSSES.values()),
        *(f"{name}, less that of E = {size.experts[0]}" for name in LOSSES.values()), "CV of loads", "dead",
    ]  # fmt: skip
    return table(header, rows)


def conclusion(results: Sequence[dict[str, Any]], size: Size) -> str:
    """What the most experts give over the fewest, and twice the experts of a token, in held-out loss."""
    few, most = size.experts[0], size.experts[-1]
    lines = []
    for width, top_k in itertools.product(size.widths, size.top_k):
        value = gain(results, (width, most, top_k), (width, few, top_k), "heldout_loss")
        means = [loss(results, (width, experts, top_k), "heldout_loss").mean for experts in size.experts]
        falls = "falls with every doubling" if means == sorted(means, reverse=True) else "does not fall throughout"
        lines.append(f"- d = {width}, k = {top_k}: from {few} to {most} experts {shown(value, 3)}; the mean {falls};")
    for width, (fewer, more) in itertools.product(size.widths, itertools.pairwise(size.top_k)):
        value = gain(results, (width, most, more), (width, most, fewer), "heldout_loss")
        lines.append(f"- d = {width}, E = {most}: from k = {fewer} to {more} {shown(value, 3)};")
    return "\n".join(lines).removesuffix(";") + "."


def report(results: Sequence[dict[str, Any]], size: Size) -> tuple[str, list[Plot]]:
    """The section of docs/studies.md, and the plots."""
    seeds = len({each["seed"] for each in results})
    compared = len(LOSSES) * sum(experts > size.experts[0] for _, experts, _ in size.shapes)
    text = f"""## Sparsity of mixtures of experts

A family of decoders of {size.overrides.get("model.layers", 2)} blocks with experts of 2 d features, E of them in a
block, of which a token goes to k, on the text of Python's standard library: {size.steps} steps of {size.batch}
sequences of {SEQUENCE_TOKENS} tokens, {size.tokens / 1e6:.1f}M tokens for all, {seeds_told(seeds)}; one learning rate
({size.lr:g}, {size.lr_from}). Losses are nats per token, training the mean of the last tenth of the steps, held-out on
text that no run has seen; differences are taken seed by seed, bold where the 95 % interval is not around 0. Of
{compared} comparisons one in twenty is bold by chance. CV of loads (standard deviation over mean) and dead experts (of
all blocks together) are those of the last tenth of the steps. With
more experts at the same k, total parameters and sparsity grow together; they can't be told apart here.

The paper (125B tokens, widths of 512 to 2048) finds what is memorised to grow with total parameters throughout,
reasoning to be best near 20 tokens for each of them, and of models of one loss those with more active parameters to
reason better. Models so small reason about nothing: this is about the losses. Held-out losses here:

{conclusion(results, size)}

{family_table(results, size)}
"""
    plots = []
    for which, name in LOSSES.items():
        for axis, curves in (("total", _by_total(results, size, which)), ("active", _by_active(results, size, which))):
            title = f"{name} loss against {axis} parameters"
            plots.append(Plot(title, f"{axis} parameters", "nats per token", curves, log_x=True))
    return text, plots


def _by_total(results: Sequence[dict[str, Any]], size: Size, which: str) -> list[Curve]:
    """A curve for each width and k, along E."""
    pairs = itertools.product(size.widths, size.top_k)
    return [
        _curve(f"d = {width}, k = {top_k}", [each for each in size.shapes if (each[0], each[2]) == (width, top_k)],
               "total", results, size, which)
        for width, top_k in pairs
    ]  # fmt: skip


def _by_active(results: Sequence[dict[str, Any]], size: Size, which: str) -> list[Curve]:
    """A curve for each width and E, along k."""
    pairs = itertools.product(size.widths, size.experts)
    return [
        _curve(f"d = {width}, E = {experts}", [each for each in size.shapes if each[:2] == (width, experts)],
               "active", results, size, which)
        for width, experts in pairs
    ]  # fmt: skip


def _curve(
    name: str, shapes: Sequence[Shape], axis: str, results: Sequence[dict[str, Any]], size: Size, which: str
) -> Curve:
    values = [loss(results, shape, which) for shape in shapes]
    parameters = [float(getattr(size.parameters[shape], axis)) for shape in shapes]
    return Curve.of(name, parameters, values)


def main() -> None:
    study_command("sparsity", __doc__, SIZES, known_runs(runs, prepare_data), report)


if __name__ == "__main__":
    main()
