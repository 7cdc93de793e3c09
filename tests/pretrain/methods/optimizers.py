"""Optimizers: the reference steps whole matrices in one process, by the published loops written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pretrain.config import Config
from pretrain.optimizer.kinds.galore import GaLoreSettings
from pretrain.optimizer.kinds.muon import MuonSettings

from . import Method

Step = Callable[[float], None]


def each_matrix(masters: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, weight and gradient of every parameter, of stacked experts each by itself."""
    for name, weight in masters.items():
        assert weight.grad is not None
        if weight.dim() == 3:
            yield from ((f"{name}[{i}]", weight[i], weight.grad[i]) for i in range(len(weight)))
        else:
            yield name, weight, weight.grad


def is_plain_matrix(name: str, weight: Tensor) -> bool:
    return name.startswith("blocks.") and weight.dim() == 2 and "router" not in name


def plain_muon(masters: dict[str, Tensor], config: Config) -> Step:
    """github.com/KellerJordan/Muon, matrix by matrix in fp32; AdamW by its equations for what is not in a block."""
    settings = config.optimizer
    assert isinstance(settings, MuonSettings)
    momenta: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    steps = 0

    def step(rate: float) -> None:
        nonlocal steps
        steps += 1
        for name, weight, gradient in each_matrix(masters):
            momenta.setdefault(name, torch.zeros_like(weight))
            exempt = "norm" in name or "embedding" in name
            decay = 0.0 if exempt else settings.weight_decay
            if is_plain_matrix(name, weight):
                momenta[name] = settings.momentum * momenta[name] + (1 - settings.momentum) * gradient
                direction = momenta[name]
                if settings.nesterov:
                    direction = (1 - settings.momentum) * gradient + settings.momentum * momenta[name]
                update = plain_orthogonalize(direction, settings.iterations)
                rows, columns = weight.shape
                ratio = max(1, rows / columns) ** 0.5
                if settings.adjust_lr == "match_rms_adamw":
                    ratio = 0.2 * max(rows, columns) ** 0.5
                weight.mul_(1 - rate * decay).sub_(update, alpha=rate * ratio)
            else:
                lr = rate * (settings.adam_lr or settings.lr) / settings.lr
                first, second = settings.betas
                momenta[name] = first * momenta[name] + (1 - first) * gradient
                squares[name] = second * squares.get(name, torch.zeros_like(weight)) + (1 - second) * gradient**2
                mean, square = momenta[name] / (1 - first**steps), squares[name] / (1 - second**steps)
                weight.mul_(1 - lr * decay).sub_(mean / (square.sqrt() + settings.eps), alpha=lr)

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
    # the iteration's slope at 0 is 3.4445^5 = 485: of what a gradient nearly lacks, the last bits show in the update
    return Method(
        {"optimizer": {"kind": "muon", "lr": 1e-3, **settings}}, optimizer=plain_muon, tolerances={"updates": 5e-5}
    )


def plain_galore(masters: dict[str, Tensor], config: Config) -> Step:
    """galore_torch's loop, matrix by matrix, with the eps added to the corrected root, as Adam does."""
    settings = config.optimizer
    assert isinstance(settings, GaLoreSettings)
    bases: dict[str, Tensor] = {}
    means: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    steps = 0

    def step(rate: float) -> None:
        nonlocal steps
        for name, weight, gradient in each_matrix(masters):
            projected = is_plain_matrix(name, weight)
            if projected:
                if steps % settings.gap == 0:
                    bases[name] = plain_vectors(gradient, settings.rank)
                small = _to_small(gradient, bases[name])
            else:
                small = gradient
            first, second = settings.betas
            means[name] = first * means.get(name, torch.zeros_like(small)) + (1 - first) * small
            squares[name] = second * squares.get(name, torch.zeros_like(small)) + (1 - second) * small**2
            mean, square = means[name] / (1 - first ** (steps + 1)), squares[name] / (1 - second ** (steps + 1))
            update = mean / (square.sqrt() + settings.eps)
            if projected:
                update = settings.scale * _to_large(update, bases[name], weight)
            decay = 0.0 if "norm" in name or "embedding" in name else settings.weight_decay
            weight.mul_(1 - rate * decay).sub_(update, alpha=rate)
        steps += 1

    return step


def plain_vectors(gradient: Tensor, rank: int) -> Tensor:
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    return right[:rank].T if len(gradient) >= len(gradient.T) else left[:, :rank]


def _to_small(gradient: Tensor, basis: Tensor) -> Tensor:
    return gradient @ basis if len(gradient) >= len(gradient.T) else basis.T @ gradient


def _to_large(update: Tensor, basis: Tensor, weight: Tensor) -> Tensor:
    return update @ basis.T if len(weight) >= len(weight.T) else basis @ update


def galore(**settings: object) -> Method:
    # a step changes a weight by a thousandth or less, so that the rounding of the weight is up to 1e-4 of it
    return Method(
        {"optimizer": {"kind": "galore", "lr": 1e-3, **settings}},
        optimizer=plain_galore,
        stages=(0, 1, 2),
        tolerances={"updates": 5e-5},
    )


METHODS = {
    "muon": muon(),
    "muon, original rate": muon(adjust_lr="original", adam_lr=3e-4, nesterov=False),
    "galore": galore(rank=8, gap=2),
    "galore, decayed": galore(rank=16, scale=1.0, weight_decay=0.1, betas=(0.9, 0.95)),
}
