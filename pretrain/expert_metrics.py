"""What a step's routing says in metric lines (``experts/...``)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .model import ModelSettings
from .monitor import MetricValue
from .objective import RoutingStatistics

DIGITS = 6
"""Of shares in lists, after the point."""

Floats = npt.NDArray[np.float64]


def expert_metrics(routing: RoutingStatistics, model: ModelSettings, names: Sequence[str]) -> dict[str, MetricValue]:
    """Balance and specialization of the experts in one optimizer step; nothing where the step held no labels.

    Over all blocks with experts: ``experts/imbalance`` (load of the busiest expert over the mean, its mean over the
    blocks), ``experts/load_cv`` (standard deviation of the loads over their mean, its mean over the blocks),
    ``experts/dead`` (experts without a single token), ``experts/entropy`` (of the routers' distributions, nats a
    token), ``experts/dropped`` (share of the slots), ``experts/specialization`` (:func:`specialization`, its mean over
    the blocks), and for each loss on routers ``experts/loss/LABEL`` (without coefficient, its mean over the blocks).

    Of block N: ``experts/imbalance/N``, ``experts/entropy/N``, ``experts/specialization/N``, ``experts/load/N`` (each
    expert's share of the slots), and ``experts/domain_load/N/NAME`` (the same of one source's tokens).
    """
    if not routing.tokens:
        return {}
    loads = routing.loads.astype(np.float64)
    by_expert = loads.sum(axis=1)
    mean = by_expert.mean(axis=1)
    imbalance, special = by_expert.max(axis=1) / mean, [specialization(each) for each in loads]
    fields: dict[str, MetricValue] = {
        "experts/imbalance": float(imbalance.mean()),
        "experts/load_cv": float((by_expert.std(axis=1) / mean).mean()),
        "experts/dead": int((by_expert == 0).sum()),
        "experts/entropy": float(routing.shannon.mean()),
        "experts/dropped": float(routing.dropped.sum() / by_expert.sum()),
        "experts/specialization": float(np.mean(special)),
    }
    fields |= {f"experts/loss/{label}": value for label, value in routing.losses.items()}
    for number, layer in enumerate(model.expert_layers):
        fields[f"experts/imbalance/{layer}"] = float(imbalance[number])
        fields[f"experts/entropy/{layer}"] = float(routing.shannon[number])
        fields[f"experts/specialization/{layer}"] = special[number]
        fields[f"experts/load/{layer}"] = _shares(by_expert[number])
        for name, of_source in zip(names, loads[number], strict=True):
            if of_source.any():
                fields[f"experts/domain_load/{layer}/{name}"] = _shares(of_source)
    return fields


def _shares(loads: Floats) -> list[float]:
    shares: list[float] = np.round(loads / loads.sum(), DIGITS).tolist()
    return shares


def specialization(loads: Floats) -> float:
    """How much an expert says about the source of its tokens: I(source; expert) / H(source), from 0 to 1.

    0: every source uses the experts alike; 1: no expert sees tokens of two sources. Sources count as many tokens as
    they have. 0 too where there is only one source.

    Args:
        loads: [S, E] slots.
    """
    joint = loads / loads.sum()
    of_source, of_expert = joint.sum(axis=1, keepdims=True), joint.sum(axis=0, keepdims=True)
    there = joint > 0
    information = float((joint[there] * np.log(joint[there] / (of_source * of_expert)[there])).sum())
    known = of_source[of_source > 0]
    entropy = float(-(known * np.log(known)).sum())
    return max(0.0, information / entropy) if entropy > 0 else 0.0


def selection_bias_range(bias: Tensor) -> float:
    """The largest difference between the selection biases of two experts of a block. ``bias`` [L, E]."""
    return float((bias.amax(dim=1) - bias.amin(dim=1)).max())
