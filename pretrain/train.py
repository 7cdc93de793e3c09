"""Training: the loop, and what stands around it — start, resume, evaluate, save, stop."""

from __future__ import annotations

import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
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
from .hangs import HangGuard
from .incidents import Incidents, NonFiniteError, non_finite_weights
from .missing import allowed_holes
from .monitor import Monitor
from .objective import Objective, StepStatistics
from .optimizer import learning_rate
from .optimizer_steps import OptimizerSteps
from .progress import Progress
from .signals import StopRequest, names
from .stability import Past
from .state import TrainState, checkpoint_state, end_position
from .step_metrics import name_dropped
from .stragglers import Stragglers
from .unreadable import UNREADABLE, UnreadableDataError, agree_on_reading


class TooManyHolesError(UserError):
    """More sequences are missing than ``data.max_hole_fraction`` allows."""


class StoppedError(HeadraceError):
    """A signal asked the run to stop; it has saved and can be started again."""

    exit_code = EXIT_STOPPED

    def __init__(self, signals: Sequence[str], step: int) -> None:
        super().__init__(f"on request ({', '.join(signals)}), saved at step {step}; start the same command to go on")
        self.signals = tuple(signals)


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
    _steps: OptimizerSteps = field(init=False)
    _progress: Progress | None = field(init=False)
    """On rank 0."""
    _stragglers: Stragglers = field(init=False)
    _incidents: Incidents = field(init=False)
    _saved_step: int = field(init=False)
    """The step of the newest checkpoint."""

    def __post_init__(self) -> None:
        config, ranks, engine = self.config, self.ranks, self.engine
        self._saved_step = self.state.step
        objective = Objective(config.objective, len(self.data.names), ranks)
        self._steps = OptimizerSteps(config, ranks, engine, objective)
        self._progress = Progress(config, self.data, ranks, engine, self.monitor) if self.monitor else None
        alone = config.engine.zero_stage < 3 and config.engine.expert_parallel == 1
        self._stragglers = Stragglers(config.resilience, ranks, alone)
        self._incidents = Incidents(config, self.data, ranks, engine, self.monitor, self._newest_checkpoint)

    def train(self, stop: StopRequest) -> None:
        """Train to the configured end.

        Raises:
            StoppedError: on a signal, after saving.
            NonFiniteError: loss or gradient norm is NaN or infinite, and ``stability`` does not let the run go on; or
                weights are, and were about to be saved.
            SpikeError: more losses were too high than ``stability`` allows.
            RollbackError: the run goes on from its newest checkpoint.
            CheckpointError: a checkpoint could not be written.
            UnreadableDataError: a rank can't read its data (a block is damaged, and ``data.on_damage`` is ``stop``; a
                server can't be reached), for the next step or an evaluation; after saving.
            TooManyHolesError: there are more holes than ``data.max_hole_fraction`` allows; after saving.
        """
        try:
            self._train(stop)
        except (UnreadableDataError, TooManyHolesError) as error:
            error.args = (f"{error}{self._save_before_end()}",)
            raise

    def _train(self, stop: StopRequest) -> None:
        config, total, steps = self.config, self.config.total_steps, self._steps
        if self._due(config.evaluation.every_steps) and self.state.step and not self.state.evaluated:
            self.evaluate()  # the attempt before was stopped between the step and its evaluation
        with self._loader() as loader:
            while self.state.step < total:
                if self.guard:
                    self.guard.begin_step(self.state.step + 1)
                started = time.perf_counter()
                step, failure = self._read(loader, stop)
                holes = steps.begin(step, self.state)
                if step is None or holes is None:
                    agree_on_reading(self.ranks, failure)
                    self._stop_before_step(stop)
                if holes:
                    self._bound_holes(holes, step)
                rate = learning_rate(self.state.step, total, config.schedule, config.optimizer.lr)
                past = Past(self.state.step + 1, self.state.losses, self.state.skips, self.rollbacks)
                # asked at the step's end: a signal that came in its midst stops the run after this step
                statistics, incident = steps.run(step, self.state, past, rate, lambda: [*stop.flags, self.store.busy])
                if incident:
                    self.state = self._incidents.meet(incident, past, steps.objective, step, self.state, holes)
                else:
                    steps.move_bias(statistics, self.state.step)
                    self.state = self.state.advance(step.next_position, statistics, config.stability.remembered)
                if self.store.saving and not statistics.flags[-1]:
                    self._tell_saved(self.store.advance_save())
                scored = steps.scoring.seconds() if steps.scoring else 0.0
                if self._progress:
                    seconds = time.perf_counter() - started
                    self._progress.pace.add(step.global_batch, seconds, loader.waited, scored)
                for straggler in self._stragglers.add(self.state.step, steps.forward.seconds(), loader.waited):
                    if self.monitor:
                        self.monitor.event(straggler)
                if holes:
                    self._record_damage(step)
                if statistics.dropped and self.monitor and not incident:
                    told, where = self._name_dropped(statistics, self.state.step), {"step": self.state.step}
                    self.monitor.event({"event": "dropped_samples", "message": told, **where})
                if self._progress:
                    self._progress.log(self.state, statistics, rate, scoring=steps.scoring is not None)
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

    def _read(self, loader: StepLoader, stop: StopRequest) -> tuple[Step | None, Exception | None]:
        """The next step; None where this rank is asked to stop while it waits, or with why the step can't be read."""
        try:
            return loader.next_step_unless(stop.overdue), None
        except UNREADABLE as error:
            return None, error

    def _save_before_end(self) -> str:
        """The run ends before its next step: save the steps since the newest checkpoint; what became of them, to be
        told beside the reason. Collective."""
        if self.guard:
            self.guard.pause()
        saved, step = self._saved_step, self.state.step
        try:
            if step != saved:
                self.save()
            self.finish_save()
        except HeadraceError as error:  # all ranks have it; the disk must not hide the reason
            return f" The steps since the newest complete checkpoint could not be saved, and are lost: {error}"
        if step == saved:
            return ""
        return f" What was done before is saved at step {step}; the same command goes on from there."

    def _stop_before_step(self, stop: StopRequest) -> NoReturn:
        """A rank was asked to stop and its data does not come: save what is done. Collective."""
        if self.guard:
            self.guard.pause()
        flags = self.ranks.gather_objects(stop.flags)
        if self.state.step != self._saved_step:
            self.save()
        raise StoppedError(names(tuple(map(any, zip(*flags, strict=True)))), self.state.step)

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
        return allowed_holes(self.config, end_position(self.config, self.state))

    def _bound_holes(self, holes: int, step: Step) -> None:
        """Stop when the step would go beyond the bound. Collective."""
        if self.state.holes + holes <= self._most_holes:
            return
        found = [damage for of_rank in self.ranks.gather_objects(step.damage) for damage in of_rank]
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
                self.monitor.event({"event": "damage", "step": self.state.step, "message": place, "new_holes": holes})

    def _due(self, every: int | None) -> bool:
        """At multiples of ``every`` and at the end of the run."""
        return every is not None and (self.state.step % every == 0 or self.state.step == self.config.total_steps)

    def evaluate(self) -> None:
        """Score the held-out split and log it.

        Raises:
            UnreadableDataError: some of it can't be read; the evaluation is still due.
        """
        started = time.perf_counter()
        self.engine.evaluating(True)
        try:
            with Watchdog(list(self.data.heldout.items()), self.config.data.watchdog_seconds, self._tell_wait):
                scores = evaluate(
                    self.engine.forward,
                    self.data.heldout,
                    torch.from_numpy(self.data.tokenizer.piece_bytes),
                    self.config.training.micro_batch,
                    self.config.evaluation.sequences,
                    self.ranks,
                    self.config.objective.loss,
                )
        finally:
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

    def _newest_checkpoint(self) -> Path | None:
        self.finish_save()
        return self.store.newest()

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
