"""Strategies of sample reweighting and the groups in which samples are weighed. The reference weighs sequence by
sequence in numpy, the whole batch at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from data_pipeline.batches import Batch
from pretrain.config import Config

from . import Method


def weighed(strategy: str, average: str = "token", z_loss: float = 0.0, **given: Any) -> Method:
    chosen = {"strategy": strategy, "temperature": 0.4, **given}
    return Method({"objective": {"average": average, "z_loss": z_loss, "reweighting": chosen}})


def by_probability(importance: Callable[[Tensor], Tensor], strategy: dict[str, Any], **given: Any) -> Method:
    """A strategy that weighs by p alone; ``importance`` is its formula, of p."""

    def objective(logits: Tensor, batch: Batch, config: Config, group: int) -> Tensor:
        losses = -logits.log_softmax(-1).gather(2, batch.labels[..., None])[..., 0] * batch.loss_mask
        counts = batch.loss_mask.sum(1, keepdim=True).clamp(min=1)
        each = batch.loss_mask / (1 if config.objective.average == "token" else counts)
        of = losses if strategy.get("of") == "token" else losses.sum(1, keepdim=True) / counts
        weighed = importance((-of.detach().double()).exp()) * each
        size = group if config.objective.reweighting.group == "micro_step" else len(losses)
        parts = list(zip(each.split(size), weighed.split(size), losses.split(size), strict=True))
        sums = [plain.sum() / part.sum().clamp(min=1e-300) * (part * loss).sum() for plain, part, loss in parts]
        return torch.stack(sums).sum() / each.sum()

    chosen = {"average": given.pop("average", "token"), "reweighting": {"strategy": strategy, **given}}
    return Method({"objective": chosen}, objective=objective)


def differentiated(p: Tensor) -> Tensor:
    """Minus the derivative of (1 - p)^2 log p by log p."""
    return (1 - p) ** 2 - 2 * p * (1 - p) * p.log()


METHODS = {
    "uniform": Method({"objective": {"z_loss": 1e-2}}),
    "linupper": weighed("linupper", z_loss=1e-2),
    "quadratic": weighed("quadratic", average="sequence"),
    "extremes": weighed("extremes", start_step=1),
    "capped": weighed("linupper", cap=1.25),
    "global-batch": weighed("linupper", group="global_batch", z_loss=1e-2),
    "global-batch-capped": weighed("extremes", group="global_batch", average="sequence", cap=1.5),
    "one-pass": weighed("linupper", group="global_batch_one_pass"),
    "one-pass-sequence": weighed("quadratic", group="global_batch_one_pass", average="sequence", start_step=1),
    "focal": by_probability(lambda p: (1 - p) ** 0.5, {"kind": "focal"}),
    "focal-tokens": by_probability(
        differentiated,
        {"kind": "focal", "gamma": 2.0, "differentiate": True, "of": "token"},
        average="sequence",
        group="global_batch_one_pass",
    ),
    "self-adjusting": by_probability(
        lambda p: (1 - p) * p / ((1 - p) * p + 1.0001) ** 2,
        {"kind": "self_adjusting", "alpha": 1.0, "of": "token"},
        group="global_batch",
    ),
}
