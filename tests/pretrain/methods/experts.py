"""Mixtures of experts. The reference is the same decoder on one process, which has all rows at once; what its layers
compute is held against independent code in tests/pretrain/test_experts.py. The losses on routers and the bias are
written out from the routers' logits of the whole batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.batches import Batch
from pretrain.config import Config
from pretrain.model import Decoder
from pretrain.objective.balancing.base import RouterLossSettings

from . import Method
from .losses import z_losses
from .optimizers import galore, muon

GALORE = galore(rank=6, gap=2)
EXPERTS = {"number": 4, "top_k": 2, "intermediate_size": 12}


class PlainBalancing:
    """Token by token, from logits; one object for one run, for it remembers the frequencies of the steps before."""

    def __init__(self) -> None:
        self.step = 0
        self.before: dict[tuple[int, str], Tensor] = {}

    def __call__(
        self, routed: list[Tensor], batch: Batch, config: Config, group_size: int, relative: np.ndarray | None
    ) -> Tensor:
        balancing, total = config.objective.balancing, torch.zeros(())
        weights = torch.ones(len(batch.tokens), dtype=torch.float64)
        if balancing.sample_weights:
            weights = torch.from_numpy(relative)
        self.now: dict[tuple[int, str], Tensor] = {}
        for loss in balancing.losses:
            for layer, logits in enumerate(routed):
                coefficient = loss.coefficient_at(self.step)
                total = total + coefficient * self.value(loss, layer, logits, batch, config, group_size, weights)
        return total

    def value(
        self,
        loss: RouterLossSettings,
        layer: int,
        logits: Tensor,
        batch: Batch,
        config: Config,
        group_size: int,
        weights: Tensor,
    ) -> Tensor:
        mask = batch.loss_mask
        each = mask.float() * weights[:, None].float() / mask.sum()
        if loss.kind == "router_z":
            return (logits.exp().sum(-1).log().square() * each).sum()
        scores = scores_of(logits, config)
        p = scores / scores.sum(-1, keepdim=True)
        if loss.kind == "entropy":
            settings = config.model.experts.entropy  # type: ignore[union-attr]  # a mixture here
            q = settings.order  # type: ignore[union-attr]  # an entropy loss has them
            return ((1 - p.pow(q).sum(-1)) / (q - 1) * each).sum()
        number = logits.shape[-1]
        chosen = chosen_by(scores, config).double() * mask[..., None] * weights[:, None, None]
        key, rows = (layer, loss.label), len(mask)
        size = {"sequence": 1, "micro_batch": config.training.micro_batch, "global_batch": rows}[loss.level]  # type: ignore[attr-defined]  # a load loss
        self.now[key] = share(chosen)
        total = torch.zeros(())
        size = group_size if loss.way == "buffer" else size  # type: ignore[attr-defined]  # of a load loss
        for start in range(0, rows, size):
            members = slice(start, start + size)
            way = loss.way  # type: ignore[attr-defined]  # of a load loss
            if way in ("previous_step", "running"):
                f = self.before.get(key, torch.full((number,), 1 / number, dtype=torch.float64))
            elif way == "buffer":
                f = share(chosen[: start + size])
            else:
                f = share(chosen[members])
            total = total + number * (f.float() * p[members] * each[members][..., None]).sum()
        return total

    def end_step(self, model: Decoder, routed: list[Tensor], batch: Batch, config: Config) -> None:
        for loss in config.objective.balancing.losses:
            for key, f in self.now.items():
                if key[1] == loss.label and loss.label.endswith("running") and key in self.before:
                    self.now[key] = loss.decay * self.before[key] + (1 - loss.decay) * f  # type: ignore[attr-defined]  # running has it
        self.before, self.step = self.now, self.step + 1
        if config.objective.balancing.bias is None:
            return
        for layer, logits in enumerate(routed):
            bias = model.blocks[layer].feed_forward.router.selection_bias
            chosen = chosen_by(scores_of(logits, config) + bias, config)
            counts = (chosen * batch.loss_mask[..., None]).sum((0, 1)).double()
            bias += config.objective.balancing.bias.rate * torch.sign(counts.mean() - counts).float()


def scores_of(logits: Tensor, config: Config) -> Tensor:
    assert config.model.experts is not None
    return logits.softmax(-1) if config.model.experts.score == "softmax" else logits.sigmoid()


def chosen_by(selection: Tensor, config: Config) -> Tensor:
    """1 for the two experts of each token with the largest numbers, within its best groups: [b, T, E]."""
    assert config.model.experts is not None
    if (groups := config.model.experts.groups) is not None:
        by_group = selection.unflatten(-1, (groups.number, -1))
        best = by_group.sort(-1, descending=True).values[..., : groups.best].sum(-1, keepdim=True)
        last = best.sort(-2, descending=True).values[..., groups.kept - 1 : groups.kept, :]
        selection = torch.where(best >= last, by_group, -torch.inf).flatten(-2)
    return F.one_hot(selection.topk(2, dim=-1).indices, selection.shape[-1]).sum(2)


def share(chosen: Tensor) -> Tensor:
    counts = chosen.sum((0, 1))
    return counts / counts.sum().clamp(min=1e-300)


def experts(settings: dict[str, Any], **sections: dict[str, Any]) -> Method:
    return Method({"model": {"experts": {**EXPERTS, **settings}}, **sections})


def balanced(settings: dict[str, Any], balancing: dict[str, Any], **objective: Any) -> Method:
    sections = {"model": {"experts": {**EXPERTS, **settings}}, "objective": {**objective, "balancing": balancing}}
    return Method(sections, balancing=PlainBalancing)


def losses(*given: dict[str, Any]) -> dict[str, Any]:
    return {"losses": [{"kind": "load_balance", "coefficient": 0.3, **each} for each in given]}


METHODS = {
    "all that changes the choice": experts(
        {
            "score": "sigmoid",
            "scaling": 1.5,
            "shared": 1,
            "jitter": 0.1,
            "groups": {"number": 2, "kept": 1},
            "capacity": {"factor": 0.9},
            "dense_first": 1,
        }
    ),
    "expert choice": experts({"routing": "expert_choice", "normalised": False}),
    "hybrid": experts({"routing": {"kind": "hybrid", "threshold": 0.5, "top_p": 0.7}, "entropy": {}}),
    "muon": replace(muon(), sections={**muon().sections, "model": {"experts": EXPERTS}}),
    "galore": replace(GALORE, sections={**GALORE.sections, "model": {"experts": EXPERTS}}),
    "every loss": balanced(
        {"entropy": {"order": 1.4}, "shared": 1},
        {
            "losses": [
                {"kind": "load_balance", "coefficient": 0.3},
                {"kind": "load_balance", "coefficient": 0.2, "level": "sequence"},
                {"kind": "router_z", "coefficient": 0.01, "change": {"to": 0.1, "end_step": 2}},
                {"kind": "entropy", "coefficient": 0.05},
            ]
        },
    ),
    "micro-batch": replace(balanced({}, losses({"level": "micro_batch"})), hangs_on_ranks=True),
    "one pass": balanced(
        {},
        losses({"frequencies": "buffer"}, {"frequencies": "previous_step"}, {"frequencies": "running", "decay": 0.6}),
    ),
    "bias among groups": balanced(
        {"number": 8, "groups": {"number": 4, "kept": 2}, "score": "sigmoid", "selection_bias": True},
        {"bias": {"rate": 0.05}},
    ),
    "spherical_z": replace(
        balanced({}, losses({}), loss={"kind": "spherical_z", "a": 0.5, "b": 3.0}), token_losses=z_losses
    ),
    "sample weights": balanced(
        {},
        {**losses({}, {"level": "sequence"}), "sample_weights": True},
        reweighting={"strategy": "linupper", "temperature": 0.4, "group": "global_batch"},
    ),
}
