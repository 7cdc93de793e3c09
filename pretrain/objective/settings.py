"""Configuration of the objective."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from data_pipeline.settings import Settings
from pretrain.methods import choice_of

from .balancing.settings import BalancingSettings
from .base import LossSettings, ProbabilitySettings, StrategySettings
from .losses.cross_entropy import CrossEntropySettings
from .strategies.uniform import UniformSettings

if TYPE_CHECKING:
    Loss = LossSettings
    Strategy = StrategySettings
else:
    Loss = choice_of("pretrain.objective.losses", LossSettings)
    Strategy = choice_of("pretrain.objective.strategies", StrategySettings)


class TemperatureWarmup(Settings):
    """Another temperature for the first reweighted steps."""

    temperature: float = Field(gt=0)
    """r of the first reweighted step; higher is nearer to uniform."""
    steps: int = Field(ge=1)
    """Optimizer steps, counted from ``start_step``, after which r has its final value."""
    change: Literal["constant", "linear", "cosine"] = "constant"
    """How r gets there: at once after these steps (the paper's code for large models: 100 for 2000 steps), on a
    straight line, or along half a cosine."""

    @model_validator(mode="after")
    def _check(self) -> TemperatureWarmup:
        if math.isinf(self.temperature) and self.change != "constant":
            raise ValueError(
                f"there is no {self.change} way from an infinite temperature; give a finite one, change=constant, or "
                "start_step, before which nothing is reweighted"
            )
        return self

    def at(self, step: int, final: float) -> float:
        """r at ``step`` of the warm-up (0 is its first) on the way to ``final``."""
        if step >= self.steps:
            return final
        if self.change == "constant":
            return self.temperature
        done = step / self.steps
        left = 1.0 - done if self.change == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return final + (self.temperature - final) * left


class ReweightingSettings(Settings):
    """Loss-based sample reweighting (Sow et al., ICLR 2025, arXiv 2502.06733)."""

    strategy: Strategy = UniformSettings()
    """How a sample's loss decides what it counts: a strategy's ``kind``, or a mapping with it and its settings."""
    temperature: float = Field(default=1.0, gt=0)
    """r of the paper: the largest weight over the smallest is at most exp(1/r); ``.inf`` is exactly uniform."""
    warmup: TemperatureWarmup | None = None
    """Another temperature at the beginning; ``null``: r is constant."""
    start_step: int = Field(default=0, ge=0)
    """Optimizer steps at the beginning that weigh uniformly (the paper's code: 1000)."""
    group: Literal["micro_step", "global_batch", "global_batch_one_pass"] = "micro_step"
    """The samples that are weighed against each other. ``micro_step``: those of one micro-step on all ranks (the
    paper's code); costs one gather of a few numbers a micro-step, and the result depends on how the batch is split.
    ``global_batch``: those of the optimizer step, exactly; costs a forward pass of all of them before the first
    backward pass. ``global_batch_one_pass``: those of the optimizer step, whose losses are placed in the loss range of
    the optimizer step before (the first step has none and weighs uniformly), while the weights are normalised over
    their own step exactly; costs one gather an optimizer step, and one pass over the gradients where it has several
    micro-steps."""
    cap: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    """Most that a sample may weigh, in units of the uniform weight: 2 is the 2/M of the paper's analysis; the others
    then weigh more, in proportion. ``null``: no bound. Not with ``global_batch_one_pass``, where the normaliser is
    known only after the backward passes."""

    @model_validator(mode="after")
    def _check(self) -> ReweightingSettings:
        given = sorted(name for name in self.model_fields_set - {"strategy"} if getattr(self, name) != _DEFAULTS[name])
        # a strategy that one of its own settings makes neutral may be a point of a sweep
        if self.strategy.neutral and given and set(type(self.strategy).model_fields) == {"kind"}:
            raise ValueError(f"{self._meaningless(given)}, or set reweighting=null where it is inherited")
        if not self.strategy.has_temperature and (unused := [n for n in given if n in ("temperature", "warmup")]):
            raise ValueError(self._meaningless(unused))
        if math.isinf(self.temperature) and self.warmup and self.warmup.change != "constant":
            raise ValueError(f"there is no {self.warmup.change} way to an infinite temperature; set change=constant")
        if self.cap is not None and self.group == "global_batch_one_pass":
            raise ValueError(
                f"cap {self.cap} needs the weights' normaliser before the backward pass, which group "
                "global_batch_one_pass has only after it; set group=global_batch or micro_step, or leave cap out"
            )
        return self

    def _meaningless(self, given: list[str]) -> str:
        verb, them = ("have", "them") if len(given) > 1 else ("has", "it")
        return f"{' and '.join(given)} {verb} no meaning with strategy {self.strategy.kind}; leave {them} out"

    @property
    def off(self) -> bool:
        """No step of the run is reweighted, whatever its number."""
        return self.strategy.neutral or (self.warmup is None and math.isinf(self.temperature))

    def temperature_at(self, step: int) -> float:
        """r of optimizer step ``step`` (from 0); infinite where it weighs uniformly."""
        if self.strategy.neutral or step < self.start_step:
            return math.inf
        return self.warmup.at(step - self.start_step, self.temperature) if self.warmup else self.temperature


_DEFAULTS = {name: field.default for name, field in ReweightingSettings.model_fields.items()}


class ObjectiveSettings(Settings):
    loss: Loss = CrossEntropySettings()
    """What a token costs: a loss's ``kind``, or a mapping with it and its settings."""
    average: Literal["token", "sequence"] = "token"
    """What has weight one in the mean: every token, or every sequence's own token mean (the paper's form). They are the
    same where all sequences have the same number of labels."""
    z_loss: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Coefficient of the mean squared log-partition of the output logits (PaLM); 0 is off."""
    reweighting: ReweightingSettings = ReweightingSettings()
    balancing: BalancingSettings = BalancingSettings()
    """Of a model with experts: losses on their routers, and balancing by a bias."""

    @model_validator(mode="after")
    def _check(self) -> ObjectiveSettings:
        if self.loss.is_likelihood:
            return self
        if self.z_loss:
            raise ValueError(
                f"z_loss {self.z_loss} is of the log-partition over all logits, which the loss {self.loss.kind} is "
                "there to avoid; leave z_loss out"
            )
        strategy = self.reweighting.strategy
        if isinstance(strategy, ProbabilitySettings) and not strategy.neutral:
            raise ValueError(
                f"reweighting.strategy {strategy.kind} weighs by p = exp(-loss), and the loss {self.loss.kind} is no "
                "-log p; take a strategy of the loss range, such as linupper"
            )
        return self
