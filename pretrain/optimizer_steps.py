"""Computing optimizer steps: a scoring pass where one is due, the micro-steps, the update or why it is left out."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch

from data_pipeline import Step

from .config import Config
from .distributed import Distributed
from .engine import Engine
from .objective import Objective, StepStatistics
from .stability import Computed, Figures, Incident, Past, judge, verdict
from .state import TrainState
from .stopwatch import Stopwatch


@dataclass
class OptimizerSteps:
    """The optimizer steps of one rank. All methods are collective."""

    config: Config
    ranks: Distributed
    engine: Engine
    objective: Objective
    forward: Stopwatch = field(init=False)
    """Of the newest step's first forward pass."""
    scoring: Stopwatch | None = field(default=None, init=False)
    """Of its scoring pass, where it had one."""

    def __post_init__(self) -> None:
        self.forward = Stopwatch(self.ranks.device)

    def begin(self, step: Step | None, state: TrainState) -> int | None:
        """How many of the step's sequences are holes, on all ranks together; None where a rank has no step."""
        batches = step.micro_batches if step else None
        return self.objective.begin_step(state.step, batches, state.loss_range, state.expert_frequencies)

    def run(
        self, step: Step, state: TrainState, past: Past, rate: float, flags: Callable[[], list[bool]]
    ) -> tuple[StepStatistics, Incident | None]:
        """One optimizer step over the global batch, which has begun: what it was, and why its update was not made, if
        it was not.

        Args:
            flags: What this rank tells the others with the step's sums; asked when these are done.
        """
        self.engine.update_buffers(state.step)
        self.scoring = self._accumulate(step)
        found: list[tuple[StepStatistics, Incident | None]] = []
        own: torch.Tensor | None = None

        def accept(norm: torch.Tensor | float) -> bool:
            nonlocal own
            own = self._own_sums() if self.config.stability.rerun else None
            statistics = self.objective.end_step(flags(), norm)
            figures = Figures(statistics.loss, statistics.objective, statistics.gradient_norm)
            found.append((statistics, judge(self.config.stability, past, figures)))
            return found[0][1] is None

        self.engine.step(rate, accept)
        statistics, incident = found[0]
        if incident and own is not None:
            first = Computed(incident.figures, tuple(own.tolist()))
            incident = replace(incident, rerun=self._rerun(step, state, rate, first))
        return statistics, incident

    def move_bias(self, statistics: StepStatistics, step: int) -> None:
        """Let the routers' selection biases follow the loads of the step that is done, number ``step`` from 0."""
        settings = self.config.objective.balancing.bias
        if settings is not None and statistics.routing is not None:
            loads = statistics.routing.loads.sum(axis=1)
            self.engine.move_selection_bias(torch.from_numpy(settings.moves(step, loads)))

    def _accumulate(self, step: Step) -> Stopwatch | None:
        """The step's gradient; the time of its scoring pass, where it had one."""
        self.engine.begin_step(len(step.micro_batches))
        scoring = self._score(step) if self.objective.scores_first else None
        for number, micro_batch in enumerate(step.micro_batches):
            batch = micro_batch.to(self.ranks.device)
            with self.forward if number == 0 else nullcontext():
                logits, routing = self.engine.training_forward(batch)
            self.engine.backward(self.objective.micro_step(logits, batch, routing))
        if (factor := self.objective.gradient_factor()) is not None:
            self.engine.scale_gradients(factor)
        return scoring

    def _score(self, step: Step) -> Stopwatch:
        """Let the objective know all losses of the step before its first backward pass; counts nothing (law 3)."""
        self.engine.evaluating(True)
        with Stopwatch(self.ranks.device) as watch, torch.no_grad():
            for micro_batch in step.micro_batches:
                batch = micro_batch.to(self.ranks.device)
                logits, routing = self.engine.training_forward(batch)
                self.objective.score(logits, batch, routing)
        self.engine.evaluating(False)
        return watch

    def _own_sums(self) -> torch.Tensor:
        return torch.cat([self.objective.own_sums(), self.engine.own_gradient.view(1)])

    def _rerun(self, step: Step, state: TrainState, rate: float, first: Computed) -> str:
        """Compute a step whose update was left out again, from the same state, and say what that tells."""
        self.begin(step, state)
        self._accumulate(step)
        found: list[Computed] = []

        def leave_out(norm: torch.Tensor | float) -> bool:
            own = self._own_sums()
            seen = self.objective.end_step((), norm)
            figures = Figures(seen.loss, seen.objective, seen.gradient_norm)
            found.append(Computed(figures, tuple(own.tolist())))
            return False

        self.engine.step(rate, leave_out)
        (again,) = found
        me = f"rank {self.ranks.rank} on {socket.gethostname()}"
        differing = self.ranks.gather_objects("" if first.same_own(again) else me)
        return verdict(first, again, [told for told in differing if told])
