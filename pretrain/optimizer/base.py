"""What an optimizer is: settings that can build it over parameter groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, model_validator

from data_pipeline.settings import Settings

if TYPE_CHECKING:
    from pretrain.config import Config


class OptimizerSettings(Settings):
    """Base of the optimizers; each lives in a module of ``pretrain.optimizer.kinds`` of its own."""

    kind: str
    """Which optimizer."""
    lr: float = Field(default=3e-4, gt=0.0, allow_inf_nan=False)
    """Peak learning rate: what the schedule reaches after its warm-up."""
    weight_decay: float = Field(default=0.1, ge=0.0, allow_inf_nan=False)
    """Share of a decayed weight removed in each step, as a multiple of the learning rate."""
    decay_norms_and_embeddings: bool = False
    """Decay the norms' gains and the embedding (a tied head with it) too."""
    clip_norm: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """A gradient whose global norm is larger is scaled down to this norm; 0 never clips."""

    def is_matrix(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a parameter is updated as a whole matrix, or, stacked [E, m, n], as E of them, by a
        :class:`~.matrix_wise.MatrixWise` optimizer."""
        return False

    def check(self, config: Config, shapes: Mapping[str, Sequence[int]]) -> None:
        """Refuse what this optimizer can't do, before any work.

        Args:
            shapes: of every parameter of the model, by name.

        Raises:
            UserError: names the parameter and the reason.
        """

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over :func:`~pretrain.optimizer.groups.parameter_groups`."""
        raise NotImplementedError

    def state_elements(self, name: str, shape: Sequence[int]) -> int:
        """Elements (fp32) that the optimizer keeps for a parameter of this shape, over all ranks of a sharded run."""
        raise NotImplementedError

    def mup_rate(self, shape: tuple[int, int], base: tuple[int, int]) -> float:
        """What muP multiplies the learning rate of a hidden matrix by (:data:`pretrain.model.mup.RateRule`).

        Raises:
            ValueError: for this optimizer it is not known.
        """
        raise ValueError(
            f"optimizer.kind {self.kind}: how its learning rate has to change with the width is confirmed nowhere. "
            "Leave out model.mup, or choose another optimizer"
        )

    def layout(self) -> dict[str, Any]:
        """The settings that decide the groups and the layout of the state: a checkpoint fits to these alone."""
        return {"kind": self.kind, "decay_norms_and_embeddings": self.decay_norms_and_embeddings}


class AdamSettings(OptimizerSettings):
    """The settings of Adam's moments, for optimizers that use it for all parameters or for some."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square, per step."""
    eps: float = Field(default=1e-8, gt=0.0, allow_inf_nan=False)
    """Added to the square root of the mean square gradient."""
    fused: bool = True
    """One kernel for Adam's whole update, where the parameters' device has it (CPU and CUDA)."""

    def adamw(self, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
        """torch's AdamW over ``groups``, fused where asked and where every parameter's device has the kernel."""
        for group in groups:
            # it is compared with the root of a mean square gradient
            group["eps"] = self.eps * group["gradient_scale"]
        devices = {parameter.device.type for group in groups for parameter in group["params"]}
        return torch.optim.AdamW(
            groups,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=True if self.fused and devices <= {"cpu", "cuda"} else None,
        )

    def state_elements(self, name: str, shape: Sequence[int]) -> int:
        return 2 * math.prod(shape)

    @model_validator(mode="after")
    def _check_betas(self) -> AdamSettings:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)} must both be at least 0 and below 1")
        return self
