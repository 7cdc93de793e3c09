"""The load-balancing loss, over a sequence, a micro-batch or the whole optimizer step."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from pretrain.model.experts.statistics import Routing

from ..base import Frequencies, Level, RouterLossSettings


class LoadBalanceSettings(RouterLossSettings):
    """E Σ_i f_i P_i in each block with experts: f_i is the share of the chosen slots that are expert i's (Σ f = 1), P_i
    the mean of the router's probabilities. 1 when balanced, E when one expert of top-1 takes all. Only P has a gradient
    (Switch, arXiv 2101.03961; levels: Qiu et al. 2025, arXiv 2501.11873).
    """

    kind: Literal["load_balance"] = "load_balance"
    balances: ClassVar[bool] = True
    level: Level = "global_batch"
    """The tokens that f and P are of: each ``sequence`` (DeepSeek-V3), the ``micro_batch`` of a rank, or the
    ``global_batch`` of the optimizer step."""
    frequencies: Frequencies | None = None
    """Of the level ``global_batch``: which f the P of a step are held against. ``exact`` (``null`` means it): the
    step's own; with several micro-steps it takes a forward pass of all of them before the first backward pass.
    ``buffer``: of the step's micro-steps so far (Qiu et al., algorithm 1). ``previous_step``: of the optimizer step
    before. ``running``: a mean of the steps before, each counting ``decay`` times as much as the one after it."""
    decay: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Of ``frequencies: running``, per optimizer step; ``null``: 0.9."""

    @model_validator(mode="after")
    def _check(self) -> LoadBalanceSettings:
        if self.level != "global_batch" and self.frequencies is not None:
            raise ValueError(
                f"frequencies {self.frequencies} has no meaning with level {self.level}, whose tokens are all known in "
                "their forward pass; leave it out"
            )
        if self.frequencies != "running" and self.decay is not None:
            raise ValueError(f"decay {self.decay} belongs to frequencies running; leave it out")
        return self

    @property
    def effective_decay(self) -> float:
        return 0.9 if self.decay is None else self.decay

    @property
    def way(self) -> Frequencies | None:
        """How f is known; None where it is the level's own tokens'."""
        return (self.frequencies or "exact") if self.level == "global_batch" else None

    @property
    def label(self) -> str:
        return self.level if self.way in (None, "exact") else f"{self.level}_{self.way}"

    def rows(self, routing: Routing, frequencies: Tensor | None) -> Tensor:
        assert frequencies is not None
        shares = frequencies if frequencies.dim() == 3 else frequencies[:, None]
        return routing.experts * (shares * routing.scores).sum(dim=-1)
