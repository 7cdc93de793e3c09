"""The fields of a metric line that come from the objective."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .monitor import MetricValue, weight_histogram
from .objective import StepStatistics


def step_metrics(statistics: StepStatistics, names: Sequence[str]) -> dict[str, MetricValue]:
    """Loss, objective, loss by source (where the step held labels of it), and the distribution of sample weights.

    Weights are relative (1 = uniform). ``weights/ess`` is the effective sample size (Σu)² / Σu² of a group over its
    size, the mean over the step's groups.
    """
    fields: dict[str, MetricValue] = {"loss": statistics.loss, "objective": statistics.objective}
    for name, nats, labels in zip(names, statistics.source_losses, statistics.source_labels, strict=True):
        if labels:
            fields[f"domain_loss/{name}"] = nats / labels
    if statistics.weights:
        groups = torch.stack(statistics.weights).double()
        sizes = groups.sum(dim=1).square() / groups.square().sum(dim=1).clamp(min=1e-300) / groups.shape[1]
        fields["weights/ess"] = sizes.mean().item()
        fields["weights/min"] = groups.min().item()
        fields["weights/max"] = groups.max().item()
        fields["weights/histogram"] = weight_histogram(groups.cpu().numpy())
    return fields
