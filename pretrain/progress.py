"""What a line of metrics.jsonl says of a training step: what was computed, and how fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from .config import Config
from .data import RunData
from .distributed import Distributed
from .engine import Engine
from .expert_metrics import expert_metrics, selection_bias_range
from .model import flops_per_token
from .monitor import Monitor, peak_flops
from .objective import StepStatistics
from .state import TrainState
from .step_metrics import step_metrics


@dataclass
class Pace:
    """Seconds and sequences of the steps since the last line of metrics.jsonl, with the seconds of waiting for data and
    of scoring passes."""

    steps: int = 0
    sequences: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    scored: float = 0.0

    def add(self, sequences: int, seconds: float, waited: float, scored: float) -> None:
        self.steps, self.sequences = self.steps + 1, self.sequences + sequences
        self.seconds, self.waited, self.scored = self.seconds + seconds, self.waited + waited, self.scored + scored

    def take(self) -> tuple[float, float, float, float]:
        """Per step: seconds, those of waiting, those of scoring; sequences per second. The next line begins anew."""
        sums, steps, speed = (self.seconds, self.waited, self.scored), self.steps, self.sequences / self.seconds
        self.steps, self.sequences, self.seconds, self.waited, self.scored = 0, 0, 0.0, 0.0, 0.0
        return sums[0] / steps, sums[1] / steps, sums[2] / steps, speed


@dataclass
class Progress:
    """The lines of rank 0's metrics.jsonl about training steps."""

    config: Config
    data: RunData
    ranks: Distributed
    engine: Engine
    monitor: Monitor
    pace: Pace = field(default_factory=Pace)

    def log(self, state: TrainState, statistics: StepStatistics, rate: float, scoring: bool) -> None:
        """Write a line where one is due.

        Args:
            state: After the step.
            statistics: The step's.
            rate: Learning rate of the update.
            scoring: Whether the step had a scoring pass.
        """
        config = self.config
        if state.step % config.monitor.log_every and state.step != config.total_steps:
            return
        seconds, waited, scored, sequences_per_second = self.pace.take()
        length, plan = config.data.seq_len, config.batch_plan
        tokens_per_second = sequences_per_second * length
        fields = step_metrics(statistics, self.data.names)
        if statistics.routing is not None:
            fields |= expert_metrics(statistics.routing, config.model, self.data.names)
            if config.objective.balancing.bias is not None:
                fields["experts/bias_range"] = selection_bias_range(self.engine.selection_bias())
        if not config.objective.reweighting.off:
            fields["weights/dropped"] = state.dropped
        if scoring:
            fields["weights/scoring_seconds"] = scored
        fields |= {
            "step": state.step,
            "position": state.position,
            "tokens": plan.sequences_before(state.position) * length,
            "learning_rate": rate,
            "grad_norm": statistics.gradient_norm,
            "step_seconds": seconds,
            "tokens_per_second": tokens_per_second,
            "data_wait_seconds": waited,
            "skipped": state.skipped,
            "holes": state.holes,
        }
        if plan.ramp:
            fields["global_batch"] = plan.batch(state.step - 1)
        if self._peak_tokens_per_second:
            fields["mfu"] = tokens_per_second / self._peak_tokens_per_second
        self.monitor.log(fields)

    @cached_property
    def _peak_tokens_per_second(self) -> float | None:
        """What the devices could do at their peak; None where the peak is unknown."""
        if self.ranks.device.type != "cuda":
            return None
        peak = peak_flops(torch.cuda.get_device_name(self.ranks.device), self.config.training.precision)
        if peak is None:
            return None
        vocabulary = self.config.model.resolve_vocab_size(self.data.tokenizer.vocab_size)
        config = self.config
        per_token = flops_per_token(config.model, vocabulary, config.data.seq_len, config.objective.loss.from_moments)
        return peak * self.ranks.world_size / per_token
