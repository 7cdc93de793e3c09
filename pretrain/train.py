"""Training: the loop, and what stands around it — start, resume, evaluate, save, stop."""

from __future__ import annotations

import math
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import NoReturn

import torch

from data_pipeline import Step, StepLoader
from data_pipeline.damage import DamageLedger, told_by_block
from data_pipeline.errors import EXIT_STOPPED, HeadraceError, UserError
from data_pipeline.watchdog import Watchdog

from .checkpoint import CheckpointStore, Saved
from .config import Config
from .data import RunData
from .distributed import Distributed
from .engine import Engine
from .evaluation import evaluate, evaluation_metrics
from .expert_metrics import expert_metrics, selection_bias_range
from .hangs import HangGuard
from .incidents import Incidents, NonFiniteError, non_finite_weights
from .model import flops_per_token
from .monitor import Monitor, peak_flops
from .objective import Objective, StepStatistics
from .optimizer import learning_rate
from .signals import StopRequest, names
from .stability import Computed, Figures, Incident, Past, judge, verdict
from .state import TrainState, checkpoint_state, end_position
from .step_metrics import name_dropped, step_metrics
from .stopwatch import Stopwatch
from .stragglers import Stragglers


class TooManyHolesError(UserError):
    """More sequences are missing than ``data.max_hole_fraction`` allows."""


class StoppedError(HeadraceError):
    """A signal asked the run to stop; it has saved and can be started again."""

    exit_code = EXIT_STOPPED

    def __init__(self, signals: Sequence[str], step: int) -> None:
        super().__init__(f"on request ({', '.join(signals)}), saved at step {step}; start the same command to go on")
        self.signals = tuple(signals)


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
class Trainer:
    """One attempt at a run, on one rank.

    ``state`` is where the run stands; it only moves on when a step is done, so it is what a checkpoint may hold.
    """

    config: Config
    data: RunData
    ranks: Distributed
    engine: Engine
    store: CheckpointStore
    monitor: Monitor | None
    """On rank 0."""
    ledger: DamageLedger | None
    """Where holes are allowed."""
    state: TrainState
    rollbacks: int = 0
    """Of the run so far."""
    guard: HangGuard | None = None
    """Watches the steps."""
    _pace: Pace = field(default_factory=Pace)
    _scoring: Stopwatch | None = field(default=None, init=False)
    """Of the step's scoring pass, where it had one."""
    _forward: Stopwatch = field(init=False)
    """Of the step's first forward pass."""
    _stragglers: Stragglers = field(init=False)
    _incidents: Incidents = field(init=False)
    _saved_step: int = field(init=False)
    """The step of the newest checkpoint."""

    def __post_init__(self) -> None:
        self._saved_step = self.state.step
        self._forward = Stopwatch(self.ranks.device)
        alone = self.config.engine.zero_stage < 3 and self.config.engine.expert_parallel == 1
        self._stragglers = Stragglers(self.config.resilience, self.ranks, alone)
        self._incidents = Incidents(self.config, self.data, self.ranks, self.engine, self.monitor, self.finish_save)

    def train(self, stop: StopRequest) -> None:
        """Train to the configured end.

        Raises:
            StoppedError: on a signal, after saving.
            NonFiniteError: loss or gradient norm is NaN or infinite, and ``stability`` does not let the run go on; or
                weights are, and were about to be saved.
            SpikeError: more losses were too high than ``stability`` allows.
            RollbackError: the run goes on from its newest checkpoint.
            CheckpointError: a checkpoint could not be written.
            DataError: a block of data is damaged, and ``data.on_damage`` is ``stop``.
            TooManyHolesError: there are more holes than ``data.max_hole_fraction`` allows; after saving.
        """
        config, total = self.config, self.config.total_steps
        objective = Objective(config.objective, len(self.data.names), self.ranks)
        if self._due(config.evaluation.every_steps) and self.state.step and not self.state.evaluated:
            self.evaluate()  # the attempt before was stopped between the step and its evaluation
        with self._loader() as loader:
            while self.state.step < total:
                if self.guard:
                    self.guard.begin_step(self.state.step + 1)
                started = time.perf_counter()
                step = loader.next_step_unless(stop.overdue)
                batches = step.micro_batches if step else None
                before = self.state.loss_range, self.state.expert_frequencies
                holes = objective.begin_step(self.state.step, batches, *before)
                if step is None or holes is None:
                    self._stop_before_step(stop)
                if holes:
                    self._bound_holes(holes, step)
                rate = learning_rate(self.state.step, total, config.schedule, config.optimizer.lr)
                statistics, incident = self._optimizer_step(objective, step, rate, stop)
                if incident:
                    self.state = self._incidents.meet(incident, self._past, objective, step, self.state, holes)
                else:
                    self._move_bias(statistics)
                    self.state = self.state.advance(step.next_position, statistics, config.stability.remembered)
                if self.store.saving and not statistics.flags[-1]:
                    self._tell_saved(self.store.advance_save())
                scored = self._scoring.seconds() if self._scoring else 0.0
                self._pace.add(step.global_batch, time.perf_counter() - started, loader.waited, scored)
                for straggler in self._stragglers.add(self.state.step, self._forward.seconds(), loader.waited):
                    if self.monitor:
                        self.monitor.event(straggler)
                if holes:
                    self._record_damage(step)
                if statistics.dropped and self.monitor and not incident:
                    told, where = self._name_dropped(statistics, self.state.step), {"step": self.state.step}
                    self.monitor.event({"event": "dropped_samples", "message": told, **where})
                self._log(statistics, rate)
                if self.guard:
                    self.guard.pause()
                finished = self.state.step == total
                signals = [] if finished else names(statistics.flags[:-1])
                if self._due(config.evaluation.every_steps) and not signals:
                    self.evaluate()
                if self._due(config.checkpoint.every_steps) or finished or signals:
                    self.save()
                if finished or signals:
                    self.finish_save()
                if signals:
                    raise StoppedError(signals, self.state.step)

    def _stop_before_step(self, stop: StopRequest) -> NoReturn:
        """A rank was asked to stop and its data does not come: save what is done. Collective."""
        flags = self.ranks.gather_objects(stop.flags)
        if self.state.step != self._saved_step:
            self.save()
        raise StoppedError(names(tuple(map(any, zip(*flags, strict=True)))), self.state.step)

    def _optimizer_step(
        self, objective: Objective, step: Step, rate: float, stop: StopRequest
    ) -> tuple[StepStatistics, Incident | None]:
        """One optimizer step over the global batch: what it was, and why its update was not made, if it was not."""
        self.engine.update_buffers(self.state.step)
        self._scoring = self._accumulate(objective, step)
        found: list[tuple[StepStatistics, Incident | None]] = []
        own: torch.Tensor | None = None

        def accept(norm: torch.Tensor | float) -> bool:
            nonlocal own
            own = self._own_sums(objective) if self.config.stability.rerun else None
            statistics = objective.end_step([*stop.flags, self.store.busy], norm)
            figures = Figures(statistics.loss, statistics.objective, statistics.gradient_norm)
            found.append((statistics, judge(self.config.stability, self._past, figures)))
            return found[0][1] is None

        self.engine.step(rate, accept)
        statistics, incident = found[0]
        if incident and own is not None:
            first = Computed(incident.figures, tuple(own.tolist()))
            incident = replace(incident, rerun=self._rerun(objective, step, rate, first))
        return statistics, incident

    def _accumulate(self, objective: Objective, step: Step) -> Stopwatch | None:
        """The step's gradient; the time of its scoring pass, where it had one."""
        self.engine.begin_step(len(step.micro_batches))
        scoring = self._score(objective, step) if objective.scores_first else None
        for number, micro_batch in enumerate(step.micro_batches):
            batch = micro_batch.to(self.ranks.device)
            with self._forward if number == 0 else nullcontext():
                logits, routing = self.engine.training_forward(batch)
            self.engine.backward(objective.micro_step(logits, batch, routing))
        if (factor := objective.gradient_factor()) is not None:
            self.engine.scale_gradients(factor)
        return scoring

    def _own_sums(self, objective: Objective) -> torch.Tensor:
        return torch.cat([objective.own_sums(), self.engine.own_gradient.view(1)])

    def _rerun(self, objective: Objective, step: Step, rate: float, first: Computed) -> str:
        """Compute a step whose update was left out again, from the same state, and say what that tells. Collective."""
        objective.begin_step(self.state.step, step.micro_batches, self.state.loss_range, self.state.expert_frequencies)
        self._accumulate(objective, step)
        found: list[Computed] = []

        def leave_out(norm: torch.Tensor | float) -> bool:
            own = self._own_sums(objective)
            seen = objective.end_step((), norm)
            figures = Figures(seen.loss, seen.objective, seen.gradient_norm)
            found.append(Computed(figures, tuple(own.tolist())))
            return False

        self.engine.step(rate, leave_out)
        (again,) = found
        me = f"rank {self.ranks.rank} on {socket.gethostname()}"
        differing = self.ranks.gather_objects("" if first.same_own(again) else me)
        return verdict(first, again, [told for told in differing if told])

    @property
    def _past(self) -> Past:
        return Past(self.state.step + 1, self.state.losses, self.state.skips, self.rollbacks)

    def _move_bias(self, statistics: StepStatistics) -> None:
        """Let the routers' selection biases follow the loads of the step that is done."""
        settings = self.config.objective.balancing.bias
        if settings is not None and statistics.routing is not None:
            loads = statistics.routing.loads.sum(axis=1)
            self.engine.move_selection_bias(torch.from_numpy(settings.moves(self.state.step, loads)))

    def _score(self, objective: Objective, step: Step) -> Stopwatch:
        """Let the objective know all losses of the step before its first backward pass; counts nothing (law 3)."""
        self.engine.evaluating(True)
        with Stopwatch(self.ranks.device) as watch, torch.no_grad():
            for micro_batch in step.micro_batches:
                batch = micro_batch.to(self.ranks.device)
                logits, routing = self.engine.training_forward(batch)
                objective.score(logits, batch, routing)
        self.engine.evaluating(False)
        return watch

    def _loader(self) -> StepLoader:
        training = self.config.training
        return StepLoader(
            self.data.order,
            self.data.sources,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            micro_batch=training.micro_batch,
            plan=self.config.batch_plan,
            seq_len=self.config.data.seq_len,
            start_step=self.state.step,
            start_position=self.state.position,
            end_step=self.config.total_steps,
            prefetch=self.config.data.prefetch,
            pin_memory=self.ranks.device.type == "cuda",
            on_damage=self.config.data.on_damage,
            watchdog_seconds=self.config.data.watchdog_seconds,
            on_wait=self._tell_wait,
        )

    def _tell_wait(self, message: str) -> None:
        where = f"rank {self.ranks.rank} on {socket.gethostname()}"
        print(f"warning: {where} waits for data after step {self.state.step:,}: {message}", file=sys.stderr, flush=True)

    @cached_property
    def _most_holes(self) -> int:
        """How many holes the run may have to its end."""
        sequences = self.config.batch_plan.sequences_before(end_position(self.config, self.state))
        return math.floor(Fraction(str(self.config.data.max_hole_fraction)) * sequences)

    def _bound_holes(self, holes: int, step: Step) -> None:
        """Stop, with everything before saved, when the step would go beyond the bound. Collective."""
        if self.state.holes + holes <= self._most_holes:
            return
        found = [damage for of_rank in self.ranks.gather_objects(step.damage) for damage in of_rank]
        if self.state.step != self._saved_step:
            self.save()
        raise TooManyHolesError(
            f"step {self.state.step + 1} has {holes} damaged sequences, and {self.state.holes} were missing before: "
            f"more than data.max_hole_fraction = {self.config.data.max_hole_fraction} of the run's sequences allows "
            f"({self._most_holes}). Damaged now: {told_by_block(found)}. Restore the shards from a copy "
            "(`pretrain-data verify` lists all damage), or raise the fraction."
        )

    def _record_damage(self, step: Step) -> None:
        """Put the holes of a step into the ledger, and each damaged block into metrics and log. Collective."""
        if self.ledger:
            self.ledger.add(self.state.step, step.damage)
        found = [damage for of_rank in self.ranks.gather_objects(step.damage) for damage in of_rank]
        if self.monitor:
            for place, holes in Counter(damage.place for damage in found).items():
                self.monitor.event({"event": "damage", "step": self.state.step, "message": place, "holes": holes})

    def _due(self, every: int | None) -> bool:
        """At multiples of ``every`` and at the end of the run."""
        return every is not None and (self.state.step % every == 0 or self.state.step == self.config.total_steps)

    def evaluate(self) -> None:
        """Score the held-out split and log it."""
        started = time.perf_counter()
        self.engine.evaluating(True)
        with Watchdog(list(self.data.heldout.items()), self.config.data.watchdog_seconds, self._tell_wait):
            scores = evaluate(
                self.engine.forward,
                list(self.data.heldout.values()),
                torch.from_numpy(self.data.tokenizer.piece_bytes),
                self.config.training.micro_batch,
                self.config.evaluation.sequences,
                self.ranks,
                self.config.objective.loss,
            )
        self.engine.evaluating(False)
        self.state = replace(self.state, evaluated=True)
        if self.monitor:
            fields = evaluation_metrics(list(self.data.heldout), scores)
            where = {"step": self.state.step, "position": self.state.position}
            self.monitor.evaluation({**fields, **where, "seconds": time.perf_counter() - started})

    def save(self) -> None:
        """Publish a checkpoint of the state as it is; where saving is asynchronous, some steps later.

        Raises:
            NonFiniteError: an update has overflowed, so that there is nothing worth saving.
        """
        if broken := non_finite_weights(self.engine, self.ranks):
            raise NonFiniteError(
                f"after step {self.state.step} weights or optimizer state are not finite ({broken}), though its loss "
                "and gradient were: an update has overflowed. No checkpoint was written. Resume from the one before "
                "with a lower optimizer.lr or a smaller optimizer.clip_norm."
            )
        if self.monitor:
            self.monitor.flush()
        self.finish_save()
        self.store.begin_save(self.engine, checkpoint_state(self.state, self.config, self.data, self.ranks))
        self._saved_step = self.state.step
        if not self.config.checkpoint.asynchronous:
            self.finish_save()

    def finish_save(self) -> None:
        """Wait for the save that goes on, if there is one. Collective."""
        self._tell_saved(self.store.finish_save())

    def _tell_saved(self, saved: Saved | None) -> None:
        if saved and self.monitor:
            print(f"saved {saved.path}{f', and {saved.copied_to}' if saved.copied_to else ''}", flush=True)
            if saved.warning:
                self.monitor.event({"event": "no_second_copy", "step": self.state.step, "message": saved.warning})
                print(f"warning: {saved.warning}", file=sys.stderr, flush=True)

    def _name_dropped(self, statistics: StepStatistics, step: int) -> str:
        return name_dropped(statistics.dropped, self.data.names, self.config.run_folder, step)

    def _log(self, statistics: StepStatistics, rate: float) -> None:
        step, settings = self.state.step, self.config.monitor
        if not self.monitor or (step % settings.log_every and step != self.config.total_steps):
            return
        seconds, waited, scored, sequences_per_second = self._pace.take()
        length, plan = self.config.data.seq_len, self.config.batch_plan
        tokens_per_second = sequences_per_second * length
        fields = step_metrics(statistics, self.data.names)
        if statistics.routing is not None:
            fields |= expert_metrics(statistics.routing, self.config.model, self.data.names)
            if self.config.objective.balancing.bias is not None:
                fields["experts/bias_range"] = selection_bias_range(self.engine.selection_bias())
        if not self.config.objective.reweighting.off:
            fields["weights/dropped"] = self.state.dropped
        if self._scoring:
            fields["weights/scoring_seconds"] = scored
        fields |= {
            "step": step,
            "position": self.state.position,
            "tokens": plan.sequences_before(self.state.position) * length,
            "learning_rate": rate,
            "grad_norm": statistics.gradient_norm,
            "step_seconds": seconds,
            "tokens_per_second": tokens_per_second,
            "data_wait_seconds": waited,
            "skipped": self.state.skipped,
            "holes": self.state.holes,
        }
        if plan.ramp:
            fields["global_batch"] = plan.batch(step - 1)
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
