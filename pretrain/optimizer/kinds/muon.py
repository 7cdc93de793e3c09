"""Muon: momentum, orthogonalised by a Newton-Schulz iteration, for the hidden matrices; AdamW for the rest.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; at scale Liu et al. 2025, arXiv 2502.16982 (Moonlight).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..base import AdamSettings
from ..groups import is_router
from ..matrices import Piece
from ..matrix_wise import Group, MatrixWise

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x, x³ and x⁵ in an iteration: chosen by Jordan for the steepest slope at 0, not for convergence to 1."""


class MuonSettings(AdamSettings):
    """Every matrix inside the blocks by Muon, those of experts each by itself; embedding, head, gains and routers by
    AdamW (``betas``, ``eps``, ``fused``)."""

    kind: Literal["muon"] = "muon"
    momentum: float = Field(default=0.95, ge=0.0, lt=1.0)
    """Decay of the running mean of the gradient, per step."""
    nesterov: bool = True
    """Orthogonalise the mean of gradient and momentum instead of the momentum."""
    iterations: int = Field(default=5, ge=1)
    """Newton-Schulz iterations."""
    adjust_lr: Literal["original", "match_rms_adamw"] = "match_rms_adamw"
    """What multiplies the rate for a weight [m, n]: ``original`` max(1, m / n)^0.5 (Jordan), ``match_rms_adamw``
    0.2 max(m, n)^0.5 (Moonlight), with which AdamW's learning rate and weight decay may be kept."""
    adam_lr: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """Peak learning rate of embedding, head, gains and routers; ``null``: ``lr``. It follows the same schedule."""
    iterate_in: Literal["bf16", "fp32"] | None = None
    """Precision of the iterations; ``null``: bf16 on GPUs, fp32 on CPUs."""

    def is_matrix(self, name: str, shape: Sequence[int]) -> bool:
        # a router is an output layer: its rows are scores, and no update should give all of them the same size
        return len(shape) in (2, 3) and name.startswith("blocks.") and not is_router(name)

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        for group in groups:
            if not group["matrix"] and self.adam_lr is not None:
                group["lr_scale"] *= self.adam_lr / self.lr
        return Muon(groups, self)

    def factor(self, shape: tuple[int, int]) -> float:
        """What multiplies the rate for a weight of this shape, by ``adjust_lr``."""
        rows, columns = shape
        if self.adjust_lr == "original":
            return math.sqrt(max(1.0, rows / columns))
        return 0.2 * math.sqrt(max(rows, columns))

    def mup_rate(self, shape: tuple[int, int], base: tuple[int, int]) -> float:
        """By the spectral condition (Yang et al. 2023, arXiv 2310.17813): the largest singular value of an update,
        which is the rate times :meth:`factor`, has to be in proportion to √(out / in)."""
        here, there = (math.sqrt(rows / columns) / self.factor((rows, columns)) for rows, columns in (shape, base))
        return here / there

    def state_elements(self, name: str, shape: Sequence[int]) -> int:
        return math.prod(shape) * (1 if self.is_matrix(name, shape) else 2)


class Muon(MatrixWise):
    """See :class:`MuonSettings`. The state of a matrix is its momentum, sharded like the matrix."""

    def __init__(self, groups: list[Group], settings: MuonSettings) -> None:
        super().__init__(groups, settings)
        self._settings = settings
        on_gpu = all(parameter.device.type == "cuda" for group in groups for parameter in group["params"])
        precision = settings.iterate_in or ("bf16" if on_gpu else "fp32")
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def begin(self, group: Group, tensor: Tensor) -> None:
        assert tensor.grad is not None
        state = self.state[tensor]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(tensor)
        state["momentum"].lerp_(tensor.grad, 1.0 - self._settings.momentum)

    def read(self, group: Group, tensor: Tensor, piece: Piece) -> Tensor:
        momentum = piece.read(self.state[tensor]["momentum"])
        if not self._settings.nesterov:
            return momentum
        return super().read(group, tensor, piece).lerp(momentum, self._settings.momentum)

    def updates(self, group: Group, matrices: dict[str, Tensor], homes: dict[str, Tensor]) -> dict[str, Tensor]:
        by_shape: dict[torch.Size, list[str]] = {}
        for name, matrix in matrices.items():
            by_shape.setdefault(matrix.shape, []).append(name)
        found: dict[str, Tensor] = {}
        for names in by_shape.values():
            stacked = torch.stack([matrices[name] for name in names])
            found.update(zip(names, orthogonalize(stacked, self._settings.iterations), strict=True))
        return found

    def factor(self, shape: tuple[int, int]) -> float:
        return self._settings.factor(shape)


def orthogonalize(matrices: Tensor, iterations: int) -> Tensor:
    """Nearly the nearest semi-orthogonal matrix to each: U S Vᵀ to U S' Vᵀ with S' about 1, from 0.68 to 1.21.

    Args:
        matrices: [k, m, n]; the arithmetic is in their dtype.
        iterations: of the quintic Newton-Schulz iteration; 5 bring there what is above 0.0015 of the Frobenius norm.

    Returns:
        [k, m, n].
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    # the Frobenius norm bounds the largest singular value, above which the iteration would diverge
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
