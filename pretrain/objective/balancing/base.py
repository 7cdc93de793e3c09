"""What a loss on routers is: settings with a coefficient that can say what each sequence adds."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from data_pipeline.settings import Settings
from pretrain.model.experts.statistics import Routing

Level = Literal["sequence", "micro_batch", "global_batch"]
Frequencies = Literal["exact", "buffer", "previous_step", "running"]


class ChangeSettings(Settings):
    """Another value later in the run."""

    to: float = Field(ge=0.0, allow_inf_nan=False)
    """The value from ``end_step`` on."""
    begin_step: int = Field(default=0, ge=0)
    """Optimizer step (from 0) at which the change begins."""
    end_step: int = Field(ge=1)
    """Optimizer step (from 0) that first has the new value."""
    shape: Literal["linear", "cosine", "at_once"] = "linear"
    """On the way: a straight line, half a cosine, or the old value up to ``end_step``."""

    @model_validator(mode="after")
    def _check(self) -> ChangeSettings:
        if self.end_step <= self.begin_step:
            raise ValueError(f"end_step {self.end_step} is not after begin_step {self.begin_step}")
        if self.shape == "at_once" and self.begin_step:
            raise ValueError(f"begin_step {self.begin_step} has no meaning with shape at_once; leave it out")
        return self

    def value(self, step: int, before: float) -> float:
        """At optimizer step ``step`` (from 0), on the way from ``before``."""
        if step >= self.end_step:
            return self.to
        if self.shape == "at_once" or step <= self.begin_step:
            return before
        done = (step - self.begin_step) / (self.end_step - self.begin_step)
        left = 1.0 - done if self.shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.to + (before - self.to) * left


class RouterLossSettings(Settings):
    """Base of the losses on routers; each lives in a module of ``pretrain.objective.balancing.kinds`` of its own.

    A loss is a sum over the blocks with experts, and in each a mean over the tokens of the optimizer step that have a
    label: coefficient · Σ_l Σ_s rows_ls / N, with N the labels of the step (law 2).
    """

    kind: str
    """Which loss."""
    coefficient: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
    """What the loss is multiplied by; 0 is off, to the bit."""
    change: ChangeSettings | None = None
    """Another coefficient later in the run; ``null``: it is constant."""
    needs_entropy: ClassVar[bool] = False
    """Whether ``model.experts.entropy`` has to be given."""
    balances: ClassVar[bool] = False
    """Whether it is there to spread tokens over experts, and so has no meaning where they are spread already."""

    @property
    def label(self) -> str:
        """In metrics; different for losses that may stand beside each other."""
        return self.kind

    @property
    def off(self) -> bool:
        """No step of the run has it."""
        return self.coefficient == 0.0 and (self.change is None or self.change.to == 0.0)

    def coefficient_at(self, step: int) -> float:
        """At optimizer step ``step`` (from 0)."""
        return self.change.value(step, self.coefficient) if self.change else self.coefficient

    def rows(self, routing: Routing, frequencies: Tensor | None) -> Tensor:
        """What each sequence adds, [L, b], with gradient.

        Args:
            routing: of a micro-batch, [L, b, ...].
            frequencies: [L, E] or [L, b, E] where the loss needs those of the experts.
        """
        raise NotImplementedError
