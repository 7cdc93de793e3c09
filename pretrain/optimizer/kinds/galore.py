"""GaLore: Adam on the projection of a matrix's gradient onto its leading singular vectors; AdamW for the rest.

Zhao et al. 2024, arXiv 2403.03507, with the settings of their code (github.com/jiaweizzhao/GaLore).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.settings import nearest
from pretrain.model.linear.base import LAYER_NAME

from ..base import AdamSettings
from ..groups import is_router
from ..matrix_wise import Group, MatrixWise

if TYPE_CHECKING:
    from pretrain.config import Config


class GaLoreSettings(AdamSettings):
    """The matrices of the chosen layers by GaLore, everything else by AdamW with the same learning rate."""

    kind: Literal["galore"] = "galore"
    lr: float = Field(default=0.01, gt=0.0, allow_inf_nan=False)
    """Peak learning rate: what the schedule reaches after its warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of the (projected) gradient and of its square, per step."""
    eps: float = Field(default=1e-6, gt=0.0, allow_inf_nan=False)
    """Added to the square root of the mean square (projected) gradient."""
    weight_decay: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Share of a decayed weight removed in each step, as a multiple of the learning rate."""
    rank: int = Field(ge=1)
    """Singular vectors that a gradient is projected onto (r)."""
    gap: int = Field(default=200, ge=1)
    """Steps from one singular value decomposition to the next."""
    scale: float = Field(default=0.25, gt=0.0, allow_inf_nan=False)
    """What multiplies the learning rate of the projected matrices."""
    modules: tuple[str, ...] = ("attention.*", "feed_forward.*")
    """Shell patterns of names of layers inside a block: the layers whose matrices are projected. Of routed experts
    (``feed_forward.experts``) each matrix is projected by itself; routers never are."""

    def is_matrix(self, name: str, shape: Sequence[int]) -> bool:
        found = LAYER_NAME.fullmatch(name)
        if found is None:
            return False
        layer = found[2].rpartition(".")[0]
        return (
            len(shape) in (2, 3)
            and not is_router(name)
            and any(fnmatchcase(layer, pattern) for pattern in self.modules)
        )

    def check(self, config: Config, shapes: Mapping[str, Sequence[int]]) -> None:
        chosen = {name: shape for name, shape in shapes.items() if self.is_matrix(name, shape)}
        found = (LAYER_NAME.fullmatch(name) for name, shape in shapes.items() if len(shape) == 2)
        layers = dict.fromkeys(each[2].rpartition(".")[0] for each in found if each)  # in the model's order
        for pattern in self.modules:
            if not any(fnmatchcase(layer, pattern) for layer in layers):
                raise UserError(f"optimizer.modules {pattern!r} matches no matrix of a block{nearest(pattern, layers)}")
        if not chosen:
            raise UserError(
                f"optimizer.modules {list(self.modules)} matches no matrix, so that galore would be adamw. Choose "
                "other layers, or kind adamw."
            )
        first, shape = next(iter(chosen.items()))
        if config.engine.zero_stage == 3:
            raise UserError(
                f"optimizer.kind galore does not go with engine.zero_stage 3: the gradient of {first} {list(shape)} "
                "and of every other matrix is split over all ranks there, and GaLore would have to gather each of them "
                "whole, in fp32, at every step. Use zero_stage 0, 1 or 2, or another optimizer."
            )
        for name, shape in chosen.items():
            if self.rank > min(shape[-2:]):
                raise UserError(
                    f"optimizer.rank {self.rank} is more than the smaller side of {name} {list(shape)}. Lower it to "
                    f"{min(shape[-2:])}, or leave the layer out of optimizer.modules."
                )

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        return GaLore(groups, self)

    def state_elements(self, name: str, shape: Sequence[int]) -> int:
        if not self.is_matrix(name, shape):
            return super().state_elements(name, shape)
        return math.prod(shape[:-2]) * self.rank * (2 * max(shape[-2:]) + min(shape[-2:]))

    def layout(self) -> dict[str, Any]:
        return {**super().layout(), "rank": self.rank, "modules": list(self.modules)}


class GaLore(MatrixWise):
    """See :class:`GaLoreSettings`.

    For a gradient G [m, n], U and V singular vectors of the last decomposition, M Adam's bias-corrected update::

        m >= n:   R = G V_r [m, r],    W -= lr scale M(R) V_rᵀ
        m < n:    R = U_rᵀ G [r, n],   W -= lr scale U_r M(R)

    The state of a matrix is the singular vectors and Adam's moments of R, kept by the matrix's owner; as in the
    authors' code, the moments stay as they are when the singular vectors change.
    """

    keeps_matrices = True
    spread = False  # at stage 0 DeepSpeed saves what rank 0 holds: every rank has to hold the state of all matrices

    def __init__(self, groups: list[Group], settings: GaLoreSettings) -> None:
        super().__init__(groups, settings)
        self._settings = settings

    def updates(self, group: Group, matrices: dict[str, Tensor], homes: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, gradient in matrices.items():
            found[name] = self._update(gradient, self.matrix_state(homes[name], name), homes[name].device)
        return found

    def _update(self, gradient: Tensor, state: dict[str, Any], home: torch.device) -> Tensor:
        """The state lies on ``home``, which may be the host; the arithmetic is done where the gradient lies."""
        settings, here = self._settings, gradient.device
        is_tall = gradient.shape[0] >= gradient.shape[1]
        state.setdefault("step", 0)
        if state["step"] % settings.gap == 0:
            state["basis"] = leading_vectors(gradient, settings.rank).to(home)
        basis: Tensor = state["basis"].to(here)
        projected = gradient @ basis if is_tall else basis.mT @ gradient
        if not state["step"]:
            state["mean"], state["square"] = (torch.zeros_like(projected, device=home) for _ in range(2))
        state["step"] += 1
        (first, second), step = settings.betas, state["step"]
        mean: Tensor = state["mean"].to(here).lerp_(projected, 1.0 - first)
        square: Tensor = state["square"].to(here).mul_(second).addcmul_(projected, projected, value=1.0 - second)
        state["mean"], state["square"] = mean.to(home), square.to(home)
        update: Tensor = mean / (1.0 - first**step) / ((square / (1.0 - second**step)).sqrt_() + settings.eps)
        return update @ basis.mT if is_tall else basis @ update

    def factor(self, shape: tuple[int, int]) -> float:
        return self._settings.scale


def leading_vectors(gradient: Tensor, rank: int) -> Tensor:
    """The singular vectors of the ``rank`` largest singular values, of the smaller side of ``gradient`` [m, n].

    Their signs are those that the library gives, as in the authors' code. Of a gradient that is not finite, all entries
    are NaN: the run stops for its reason and not for this.

    Returns:
        V_r [n, r] where m >= n, else U_r [m, r].
    """
    if not torch.isfinite(gradient).all():
        return gradient.new_full((min(gradient.shape), rank), float("nan"))
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    vectors: Tensor = right.mT[:, :rank] if gradient.shape[0] >= gradient.shape[1] else left[:, :rank]
    # a copy: the part of a tensor would keep all singular vectors in memory and in checkpoints
    return vectors.clone(memory_format=torch.contiguous_format)
