"""What the runs of a study have in common: how long they train, on how many seeds, at which rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

ON_A_GPU: dict[str, Any] = {
    "model.layers": 8,
    "model.init_std": 0.02,
    "training.precision": "bf16",
    "checkpoint.every_steps": 1000,
    "data.sources.code.max_epochs": None,
    "data.sources.docs.max_epochs": None,
}
"""Overrides of the larger settings."""
WIDE_ON_A_GPU: dict[str, Any] = {
    **ON_A_GPU,
    "model.hidden_size": 512,
    "model.heads": 8,
    "model.intermediate_size": 1408,
}


@dataclass(frozen=True)
class Trainings:
    """How much of a study is run: ``seeds`` runs of every kind, from 1 on, all of them trained alike."""

    steps: int
    seeds: int
    _: KW_ONLY
    warmup: int = 30
    lr: float = 0.016
    lr_from: str = "not tuned"
    """Why this rate, in words."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Of ``studies/base.yaml``."""

    def settings(self, seed: int, batch: int, evaluate_every: int) -> dict[str, Any]:
        """The overrides that all kinds of runs have, in micro-batches of the whole batch."""
        return {
            **self.overrides,
            "training.steps": self.steps,
            "training.global_batch": batch,
            "training.micro_batch": batch,
            "schedule.warmup_steps": self.warmup,
            "evaluation.every_steps": evaluate_every,
            "optimizer.lr": self.lr,
            "run.seed": seed,
        }

    def model_settings(self) -> dict[str, Any]:
        """Those of the overrides that are the model's."""
        return {key: value for key, value in self.overrides.items() if key.startswith("model.")}
