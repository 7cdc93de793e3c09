"""The ``stability`` section: what a run does with steps that would harm it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from data_pipeline.settings import Settings


class SpikeSettings(Settings):
    """When a loss is too high to be chance. The robust z-score of a step's loss x against the losses of the last
    ``window`` steps whose update was made is 0.6745 (x - median) / MAD (:mod:`.robust`)."""

    action: Literal["skip", "rollback"] = "skip"
    """``skip``: the step's update is not made. ``rollback``: go back to the newest complete checkpoint and leave out
    the positions up to and with the spike's (``stability.drop_steps``)."""
    threshold: float = Field(default=6.0, gt=0, allow_inf_nan=False)
    """A z-score above it is a spike."""
    window: int = Field(default=128, ge=8)
    """Losses that a step is held against."""
    least: int = Field(default=64, ge=8)
    """With fewer losses than this no step is judged."""

    @model_validator(mode="after")
    def _check(self) -> SpikeSettings:
        if self.least > self.window:
            raise ValueError(f"least {self.least} losses never come together in a window of {self.window}; lower it")
        return self


class StabilitySettings(Settings):
    non_finite: Literal["skip", "rollback", "stop"] = "skip"
    """Where loss, objective or gradient norm is not finite: ``skip`` leaves the step's update out on all ranks,
    ``rollback`` goes back to the newest complete checkpoint and leaves its positions out, ``stop`` ends the run."""
    spike: SpikeSettings | None = None
    """``null``: no loss is too high."""
    max_skips_in_row: int = Field(default=3, ge=1)
    """Steps in a row without an update; one more ends the run."""
    max_skips: int = Field(default=10, ge=1)
    """Steps without an update among the last ``skip_window``; one more ends the run."""
    skip_window: int = Field(default=1000, ge=1)
    """Optimizer steps over which ``max_skips`` counts."""
    max_rollbacks: int = Field(default=3, ge=1)
    """Rollbacks of the whole run; one more ends it."""
    drop_steps: int | None = Field(default=None, ge=1)
    """How many steps' positions a rollback leaves out, the last of them the incident's; at most back to the checkpoint.
    ``null``: all from the checkpoint on."""
    deterministic: bool = False
    """Take only kernels that give the same bits each time (:mod:`pretrain.deterministic`), which may be slower; an
    operation that has none is an error."""
    rerun: bool = False
    """Compute the step of an incident a second time from the same state: the same bits mean data, others hardware.
    Needs ``deterministic``. Costs a step for each incident, and a sum of squares in every step."""

    @model_validator(mode="after")
    def _check(self) -> StabilitySettings:
        if self.rerun and not self.deterministic:
            raise ValueError("rerun can tell nothing from kernels that add in any order; set deterministic=true")
        actions = {self.non_finite, self.spike.action if self.spike else "stop"}
        bounds = (["max_skips_in_row", "max_skips", "skip_window"], {"skip", "rollback"}, "leaves a step out")
        for names, needed, what in (bounds, (["max_rollbacks", "drop_steps"], {"rollback"}, "goes back")):
            for name in names:
                if not actions & needed and getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name} {getattr(self, name)} says nothing where nothing {what}; leave it out, or set "
                        f"non_finite or spike.action to {' or '.join(sorted(needed))}"
                    )
        return self

    @property
    def remembered(self) -> int:
        """Losses that a run keeps in mind."""
        return self.spike.window if self.spike else 0
