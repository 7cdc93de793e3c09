"""The ``objective.balancing`` section of a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from data_pipeline.settings import Settings
from pretrain.methods import choice_of

from .base import ChangeSettings, RouterLossSettings

if TYPE_CHECKING:
    RouterLoss = RouterLossSettings
else:
    RouterLoss = choice_of("pretrain.objective.balancing.kinds", RouterLossSettings)


class BiasSettings(Settings):
    """Balancing without a loss (Wang et al. 2024, arXiv 2408.15664; DeepSeek-V3): after each optimizer step the
    selection bias of every expert that had fewer slots than the mean rises by ``rate``, that of the others falls."""

    rate: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1e-3
    """u, what a bias moves in an optimizer step."""
    change: ChangeSettings | None = None
    """Another rate later in the run (DeepSeek-V3: 0 for its end); ``null``: it is constant."""
    subtract_mean: bool = False
    """Take the mean over a block's experts away from each move, so that the biases don't drift together (torchtitan);
    it changes no choice."""

    def moves(self, step: int, loads: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """What is added to the biases after optimizer step ``step`` (from 0), [L, E], from the slots of the step."""
        rate = self.change.value(step, self.rate) if self.change else self.rate
        # by whole numbers: the mean of the loads may not be one
        moves: npt.NDArray[np.float64] = rate * np.sign(loads.sum(axis=1, keepdims=True) - loads * loads.shape[1])
        if self.subtract_mean:
            moves -= moves.mean(axis=1, keepdims=True)
        return moves


class BalancingSettings(Settings):
    losses: tuple[RouterLoss, ...] = ()
    """Losses on the routers, any number together, each with a ``kind``: ``load_balance``, ``router_z``, ``entropy``."""
    bias: BiasSettings | None = None
    """Move the routers' selection biases (``model.experts.selection_bias``); ``null``: they stay."""
    sample_weights: bool = False
    """A sequence counts in the losses on routers as much as reweighting makes it count in the model's own; else all
    count the same. The bias and the metrics always see plain counts."""

    @model_validator(mode="after")
    def _check(self) -> BalancingSettings:
        labels = [loss.label for loss in self.losses]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"losses holds {', '.join(twice)} twice; add their coefficients up")
        if self.sample_weights and not self.losses:
            raise ValueError("sample_weights has no meaning without losses; leave it out")
        return self
