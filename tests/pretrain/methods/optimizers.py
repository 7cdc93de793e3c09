"""Optimizers: the reference steps whole matrices in one process, by the published loops written out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pretrain.config import Config
from pretrain.optimizer.kinds.muon import MuonSettings

from . import Method

Step = Callable[[float], None]


def plain_muon(masters: dict[str, Tensor], config: Config) -> Step:
    """github.com/KellerJordan/Muon, matrix by matrix in fp32; AdamW by its equations for what is not in a block."""
    settings = config.optimizer
    assert isinstance(settings, MuonSettings)
    momenta = {name: torch.zeros_like(p) for name, p in masters.items()}
    squares = {name: torch.zeros_like(p) for name, p in masters.items()}
    steps = 0

    def step(rate: float) -> None:
        nonlocal steps
        steps += 1
        for name, weight in masters.items():
            gradient = weight.grad
            assert gradient is not None
            exempt = "norm" in name or "embedding" in name
            decay = 0.0 if exempt else settings.weight_decay
            if name.startswith("blocks.") and weight.dim() == 2:
                momenta[name] = settings.momentum * momenta[name] + (1 - settings.momentum) * gradient
                direction = momenta[name]
                if settings.nesterov:
                    direction = (1 - settings.momentum) * gradient + settings.momentum * momenta[name]
                update = plain_orthogonalize(direction, settings.iterations)
                rows, columns = weight.shape
                ratio = max(1, rows / columns) ** 0.5
                if settings.adjust_lr == "match_rms_adamw":
                    ratio = 0.2 * max(rows, columns) ** 0.5
                weight.copy_(weight - rate * decay * weight - rate * ratio * update)
            else:
                lr = rate * (settings.adam_lr or settings.lr) / settings.lr
                first, second = settings.betas
                momenta[name] = first * momenta[name] + (1 - first) * gradient
                squares[name] = second * squares[name] + (1 - second) * gradient**2
                mean, square = momenta[name] / (1 - first**steps), squares[name] / (1 - second**steps)
                weight.copy_(weight - lr * decay * weight - lr * mean / (square.sqrt() + settings.eps))

    return step


def plain_orthogonalize(direction: Tensor, iterations: int) -> Tensor:
    """The quintic iteration of Jordan's post on one matrix, with the wide side first."""
    x = direction.T if len(direction) > len(direction.T) else direction
    x = x / (x.square().sum().sqrt() + 1e-7)
    for _ in range(iterations):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * (square @ square)) @ x
    return x.T if len(direction) > len(direction.T) else x


def muon(**settings: object) -> Method:
    # the iteration's slope at 0 is 3.4445^5 = 485: where a gradient is nearly of low rank, its last bit of fp32 makes
    # some 3e-5 of the update
    return Method(
        {"optimizer": {"kind": "muon", "lr": 1e-3, **settings}}, optimizer=plain_muon, tolerances={"updates": 1e-4}
    )


METHODS = {
    "muon": muon(),
    "muon, original rate": muon(adjust_lr="original", adam_lr=3e-4, nesterov=False),
}
