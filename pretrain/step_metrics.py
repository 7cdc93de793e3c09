"""What a step's statistics say in metric lines and in words."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .monitor import MetricValue, weight_histogram
from .objective import Dropped, StepStatistics, StepWeights

NAMED = 8
"""Dropped samples of a step that are named at most; the others are counted."""


def step_metrics(statistics: StepStatistics, names: Sequence[str]) -> dict[str, MetricValue]:
    """Loss, objective, loss by source (where the step held labels of it), and the distribution of sample weights.

    Weights are relative (1 = uniform). ``weights/ess`` is the effective sample size (Σu)² / Σu² of a group over its
    size, the mean over the step's groups; ``weights/share/NAME`` a source's part of Σ u c, and
    ``weights/uniform_share/NAME`` what that would be with uniform weights (its part of the step's labels, or of its
    sequences with ``average: sequence``); ``weights/loss_min`` and ``weights/loss_max`` the range of the samples' mean
    losses, nats; ``weights/temperature`` r of the step.
    """
    fields: dict[str, MetricValue] = {"loss": statistics.loss, "objective": statistics.objective}
    for name, nats, labels in zip(names, statistics.source_losses, statistics.source_labels, strict=True):
        if labels:
            fields[f"domain_loss/{name}"] = nats / labels
    if statistics.weights is not None:
        fields |= _weight_metrics(statistics.weights, names)
        if math.isfinite(statistics.temperature):
            fields["weights/temperature"] = statistics.temperature
    return fields


def _weight_metrics(step: StepWeights, names: Sequence[str]) -> dict[str, MetricValue]:
    weights = step.weights.double().cpu().numpy()
    losses, counts, sources, *_ = (column.cpu().numpy() for column in step.samples)
    valid = step.samples.valid.cpu().numpy()
    sizes = np.square(weights.sum(axis=1)) / np.maximum(np.square(weights).sum(axis=1), 1e-300) / weights.shape[1]
    fields: dict[str, MetricValue] = {
        "weights/ess": float(sizes.mean()),
        "weights/min": float(weights.min()),
        "weights/max": float(weights.max()),
        "weights/histogram": weight_histogram(weights),
    }
    if valid.any():
        fields["weights/loss_min"] = float(losses[valid].min())
        fields["weights/loss_max"] = float(losses[valid].max())
    bins = sources.astype(int).ravel()
    shares, plain = (np.bincount(bins, each.ravel(), len(names)) for each in (weights * counts, counts))
    for name, share, uniform in zip(names, shares, plain, strict=True):
        if uniform:
            fields[f"weights/share/{name}"] = float(share / shares.sum()) if shares.sum() else 0.0
            fields[f"weights/uniform_share/{name}"] = float(uniform / plain.sum())
    return fields


def name_dropped(dropped: Sequence[Dropped], names: Sequence[str], run_folder: Path, step: int) -> str:
    """The samples of step ``step`` (from 1) whose loss was not finite, each with the command that shows it; "" if none.

    Args:
        names: of the sources.
    """
    named = [
        f"position {found.position} of source {names[found.source]!r} (`pretrain-data explain "
        f"{shlex.quote(str(run_folder))} --step {step} --rank {found.rank} --row {found.row}`)"
        for found in dropped[:NAMED]
    ]
    if not named:
        return ""
    more = f" and {len(dropped) - NAMED} more" if len(dropped) > NAMED else ""
    return f"{len(dropped)} samples without a finite loss: {'; '.join(named)}{more}"
