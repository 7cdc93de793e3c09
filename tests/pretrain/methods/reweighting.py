"""Strategies of sample reweighting and the groups in which samples are weighed. The reference weighs sequence by
sequence in numpy, the whole batch at once."""

from __future__ import annotations

from typing import Any

from . import Method


def weighed(strategy: str, average: str = "token", z_loss: float = 0.0, **given: Any) -> Method:
    chosen = {"strategy": strategy, "temperature": 0.4, **given}
    return Method({"objective": {"average": average, "z_loss": z_loss, "reweighting": chosen}})


METHODS = {
    "uniform": Method({"objective": {"z_loss": 1e-2}}),
    "linupper": weighed("linupper", z_loss=1e-2),
    "quadratic": weighed("quadratic", average="sequence"),
    "extremes": weighed("extremes", start_step=1),
    "capped": weighed("linupper", cap=1.25),
    "global-batch": weighed("linupper", group="global_batch", z_loss=1e-2),
    "global-batch-capped": weighed("extremes", group="global_batch", average="sequence", cap=1.5),
    "one-pass": weighed("linupper", group="global_batch_one_pass"),
    "one-pass-sequence": weighed("quadratic", group="global_batch_one_pass", average="sequence", start_step=1),
}
