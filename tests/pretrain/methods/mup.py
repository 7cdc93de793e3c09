"""muP away from its base shape. The reference's optimizer has every factor written out; what the forward pass and the
initial weights are is held against independent code in ``test_mup``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pretrain.config import Config
from pretrain.optimizer import AdamWSettings

from . import Method
from .optimizers import muon, plain_muon

# the tiny model has hidden 32, 4 heads of 8 and 48 inside the feed-forward: m = 4, 2 and 3
BASE = {"hidden_size": 8, "heads": 4, "head_dim": 4, "intermediate_size": 16}
M = {"query": 4, "key": 4, "value": 4, "output": 2, "gate": 4, "up": 4, "down": 3}


def plain_mup(masters: dict[str, Tensor], config: Config) -> Callable[[float], None]:
    """One AdamW for each tensor, at its own rate, decay and eps."""
    settings = config.optimizer
    assert isinstance(settings, AdamWSettings)
    optimizers = []
    for name, master in masters.items():
        owner = name.split(".")[-2]
        m = M.get(owner, 1)
        decay = settings.weight_decay * m if owner in M or owner == "head" else 0.0
        optimizer = torch.optim.AdamW([master], betas=settings.betas, eps=settings.eps / 4, weight_decay=decay)
        optimizers.append((optimizer, m))

    def step(rate: float) -> None:
        for optimizer, m in optimizers:
            optimizer.param_groups[0]["lr"] = rate / m
            optimizer.step()

    return step


# √(out / in) over 0.2 √max(out, in), over the same of the base shape, whose key-value heads are 2
MUON_RATES = {
    "query": 0.5, "key": 8**-0.5, "value": 8**-0.5, "output": 1.0, "gate": 0.5, "up": 0.5, "down": 2 / 3
}  # fmt: skip


def plain_mup_muon(masters: dict[str, Tensor], config: Config) -> Callable[[float], None]:
    """The plain Muon for each tensor, at its own rate, decay and eps."""
    steps = []
    for name, master in masters.items():
        scale = MUON_RATES.get(name.split(".")[-2], 1.0)
        own = {"weight_decay": config.optimizer.weight_decay / scale, "eps": 1e-4 / 4}
        changed = config.model_copy(update={"optimizer": config.optimizer.model_copy(update=own)})
        steps.append((plain_muon({name: master}, changed), scale))

    def step(rate: float) -> None:
        for of_tensor, scale in steps:
            of_tensor(rate * scale)

    return step


def mup(**model: Any) -> Method:
    settings = {"base": BASE, "embedding_multiplier": 3.0, "output_multiplier": 2.0}
    return Method({"model": {"mup": settings, **model}}, optimizer=plain_mup)


def mup_muon() -> Method:
    plain = muon()
    sections = {**mup().sections, **plain.sections}
    return Method(sections, optimizer=plain_mup_muon, tolerances=plain.tolerances)


METHODS = {"mup": mup(), "mup, tied": mup(tied_embeddings=True), "mup, muon": mup_muon()}
