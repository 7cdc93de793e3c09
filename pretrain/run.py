"""``pretrain train``: from the command line to an exit code, with every rank ending for the same reason."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np

from data_pipeline import kernel
from data_pipeline.damage import DAMAGE_FOLDER, DamageLedger, inherit_ledger
from data_pipeline.errors import (
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    DataError,
    HeadraceError,
    UserError,
)
from data_pipeline.history import record_stretch

from .agreement import AgreedError, agreed, attempt, together
from .beginning import Beginning, open_beginning
from .check import check_run, warnings
from .checkpoint import CheckpointError, CheckpointStore, read_state, refuse_copies, seed_generators
from .config import Config, load_config
from .data import RunData, stretch_of_run
from .deterministic import be_deterministic
from .distributed import Distributed, finish, start
from .engine import Engine
from .hangs import HangError, HangGuard
from .incidents import NonFiniteError, RollbackError, SpikeError
from .initial_weights import Weights
from .missing import look_for_missing, told
from .monitor import AttemptsLog, Monitor, Reason, read_attempts
from .run_folder import CHECKPOINTS, HANGS, lock_run_folder, open_run_folder, set_aside, versions, write_config
from .signals import StopRequest
from .stability.rollbacks import ahead, read_rollbacks
from .state import (
    TrainState,
    config_changes,
    end_position,
    group_change,
    leaving_out,
    left_out,
    resume_state,
    topology_changes,
)
from .terminal import outlive_output
from .train import StoppedError, TooManyHolesError, Trainer
from .unreadable import UnreadableDataError


def restarts() -> int:
    """How often a launcher has started this program again by itself: ``resume=never`` is meant once."""
    launchers = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", "HEADRACE_RESTART_COUNT")
    return sum(int(os.environ.get(name, "0")) for name in launchers)


START_TIMEOUT_SECONDS = 300
"""For the ranks to find each other when the configuration, which holds the real one, could not be read."""


TOGETHER = (
    AgreedError,
    CheckpointError,
    NonFiniteError,
    RollbackError,
    SpikeError,
    StoppedError,
    TooManyHolesError,
    UnreadableDataError,
)
"""Errors that all ranks raise at the same place, so that they can still wait for each other."""


def run_training(path: Path, overrides: Sequence[str]) -> NoReturn:
    """Train the run that ``path`` and ``overrides`` describe, and end the process with the exit code of the reason."""
    stop = StopRequest()
    outlive_output()
    config, failure = attempt(lambda: _configure(path, overrides))
    ranks = start(config.resilience.collective_timeout_seconds if config else START_TIMEOUT_SECONDS)
    session = Session(ranks)
    try:
        session.run(agreed(ranks, config, failure), stop)
        code = session.end("done", EXIT_DONE)
    except StoppedError as error:
        code = session.end("stopped", EXIT_STOPPED, error, signal="+".join(error.signals))
    except NonFiniteError as error:
        code = session.end("non_finite", error.exit_code, error)
    except SpikeError as error:
        code = session.end("unstable", error.exit_code, error)
    except HeadraceError as error:
        code = session.end("user_error" if error.exit_code == EXIT_USER_ERROR else "crash", error.exit_code, error)
        finish(code, together=isinstance(error, TOGETHER))
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # printed with its traceback, and recorded
        traceback.print_exc()
        finish(session.end("crash", EXIT_CRASH, error), together=False)
    finish(code, together=True)


def _configure(path: Path, overrides: Sequence[str]) -> Config:
    config = load_config(path, overrides)
    if config.stability.deterministic:
        be_deterministic()
    return config


class Session:
    """One start of a run on one rank: what has to be recorded when it ends, however it ends."""

    def __init__(self, ranks: Distributed) -> None:
        self._ranks = ranks
        self._folder: Path | None = None
        self._attempt = 0
        self._trainer: Trainer | None = None
        self._monitor: Monitor | None = None
        self._ledger: DamageLedger | None = None
        self._guard: HangGuard | None = None

    def run(self, config: Config, stop: StopRequest) -> None:
        """Check, start or resume, train. Raises what :meth:`Trainer.train` raises, and UserError before any work."""
        ranks = self._ranks
        folder = together(ranks, lambda: open_run_folder(config))
        together(ranks, lambda: lock_run_folder(folder) if ranks.rank == 0 else 0)
        self._folder = folder
        attempts = together(ranks, lambda: AttemptsLog(folder) if ranks.rank == 0 else None)
        self._attempt = ranks.broadcast_object(len(read_attempts(folder)) + 1 if attempts else 0)
        data = together(ranks, lambda: check_run(config, ranks.world_size, ranks.rank))
        if config.resume == "never" and restarts() == 0:
            together(ranks, lambda: refuse_copies(config.checkpoint, folder.name) if ranks.rank == 0 else None)
            together(ranks, lambda: set_aside(folder, self._attempt) if ranks.rank == 0 else None)
        store = together(ranks, lambda: CheckpointStore(folder / CHECKPOINTS, config.checkpoint, ranks))
        engine: Engine | None = None
        while True:
            engine = self._start(config, data, store, attempts, engine)
            assert self._trainer is not None
            try:
                return self._train(self._trainer, stop)
            except RollbackError as error:
                self.end("rolled_back", error.exit_code, error)
                self._attempt += 1

    def _train(self, trainer: Trainer, stop: StopRequest) -> None:
        try:
            trainer.train(stop)
        except TOGETHER:
            trainer.finish_save()
            raise

    def _start(
        self,
        given: Config,
        data: RunData,
        store: CheckpointStore,
        attempts: AttemptsLog | None,
        engine: Engine | None,
    ) -> Engine:
        """Begin, or go on from the newest checkpoint: everything up to the first step. Collective.

        Args:
            given: the configuration as its user gave it.
            data: what it reads.
            store: of the run's checkpoints.
            attempts: on rank 0.
            engine: of the attempt before, where the run has gone back by itself; None: it is to be made.
        """
        ranks = self._ranks
        assert self._folder is not None
        folder = self._folder
        origin, damage = self._origin(given, store)
        read = together(ranks, lambda: left_out(given, origin) if ranks.rank == 0 else ())
        skipped = ranks.broadcast_object(read)
        config = leaving_out(given, skipped)
        state = TrainState()
        if origin is not None:
            found = origin
            state = together(ranks, lambda: resume_state(found, config, data))
        beginning = None if origin else self._beginning(config, data)
        if beginning:
            state = beginning.state
        state = replace(state, left_out=skipped)
        hosts = ranks.gather_objects(socket.gethostname())
        together(ranks, lambda: self._begin(given, config, data, attempts, state, origin, beginning, hosts, damage))
        self._tell_missing(config, data, state)
        if engine is None:
            self._tell_kernel()
        # rank 0's look decides: on a network file system another rank may not see the folder yet
        if ranks.broadcast_object(config.data.on_damage == "hole" or (folder / DAMAGE_FOLDER).is_dir()):
            self._ledger = together(
                ranks, lambda: DamageLedger(folder / DAMAGE_FOLDER, ranks.rank, self._attempt, state.position)
            )
        if engine is None:
            vocab_size = config.model.resolve_vocab_size(data.tokenizer.vocab_size)
            initial = beginning if beginning and beginning.shapes else None
            engine = Engine(config, vocab_size, ranks, initial, empty=origin is not None)
            seed_generators(config.run.seed, ranks.rank)
        if origin is not None:
            store.load(origin, engine)
        made = together(ranks, lambda: len(read_rollbacks(folder)) if ranks.rank == 0 else 0)
        rollbacks = ranks.broadcast_object(made)
        if self._guard is None:
            traces = folder / HANGS / f"attempt_{self._attempt}"
            self._guard = HangGuard(
                config.resilience, traces, ranks, lambda error: self.end("crash", error.exit_code, error)
            )
        self._trainer = Trainer(
            config, data, ranks, engine, store, self._monitor, self._ledger, state, rollbacks, self._guard
        )
        return engine

    def _origin(self, config: Config, store: CheckpointStore) -> tuple[Path | None, list[str]]:
        """The checkpoint to go on from, and what was wrong with newer ones. Collective."""
        try:
            origin, damage = store.find()
        except DataError as error:
            raise AgreedError(str(error), error.exit_code) from error
        if origin is not None or config.resume in ("auto", "never"):
            return origin, damage
        given = Path(config.resume)
        if problems := store.damage(given):
            raise AgreedError(
                f"resume = {config.resume!r} is no complete checkpoint: {'; '.join(problems)}. Give the path of a "
                "step_... folder, auto, or never.",
                EXIT_USER_ERROR,
            )
        return given, damage

    def _beginning(self, config: Config, data: RunData) -> Beginning:
        """What the run begins with, on every rank, though only rank 0 has to see the files. Collective."""
        ranks = self._ranks
        opened = together(ranks, lambda: open_beginning(config, data).decide_masks() if ranks.rank == 0 else None)
        there = ranks.broadcast_object(opened)  # without the masks
        beginning = opened or there
        assert beginning is not None
        return beginning

    def _begin(
        self,
        given: Config,
        config: Config,
        data: RunData,
        attempts: AttemptsLog | None,
        state: TrainState,
        origin: Path | None,
        beginning: Beginning | None,
        hosts: list[str],
        damage: list[str],
    ) -> None:
        """On rank 0: write the configuration, open the metrics at the step to go on from, record the start."""
        if attempts is None:
            return
        assert self._folder is not None
        write_config(self._folder, given, data.identity)
        record_stretch(self._folder, stretch_of_run(config, data, state.step, state.position, self._ranks.world_size))
        self._monitor = Monitor(
            self._folder, state.step, config.total_steps, config.monitor.tensorboard, state.evaluated
        )
        moved = topology_changes(origin, config, self._ranks) if origin else []
        attempts.start(
            hosts=sorted(set(hosts)),
            world_size=self._ranks.world_size,
            versions=versions(),
            first_step=state.step + 1,
            resumed_from=str(origin) if origin else None,
            initial_weights=_identity(beginning.weights) if beginning and beginning.weights else None,
            masks=[_identity(source.weights) for source in beginning.mask_sources] if beginning else [],
            topology_changes=moved,
            superseded_lines=self._monitor.superseded,
            lost_steps=self._monitor.lost_steps,
        )
        for line in _where_it_stands(self._folder, config, state, origin, beginning, self._monitor.lost_steps):
            print(line, flush=True)
        for change in moved:
            print(f"topology changed since that checkpoint: {change}", flush=True)
        regrouped = group_change(origin, config, self._ranks) if origin else None
        for line in [*([regrouped] if regrouped else []), *warnings(config, self._ranks.world_size)]:
            print(f"warning: {line}", file=sys.stderr, flush=True)
        if origin is not None and state.holes and self._folder.resolve() not in origin.resolve().parents:
            inherit_ledger(self._folder / DAMAGE_FOLDER, origin.parent.parent / DAMAGE_FOLDER, state.position)
            told = f"holes of the run that {origin} is of"
            self._monitor.event({"event": "damage", "step": state.step, "message": told, "new_holes": state.holes})
        for rollback in ahead(read_rollbacks(self._folder), state.position):
            told = (
                f"{rollback.kind.replace('_', ' ')} at step {rollback.step}: {rollback.message}. The run went back to "
                f"step {state.step} and leaves out the positions {rollback.start} to {rollback.stop - 1}"
            )
            self._monitor.event({"event": "rollback", "step": state.step, "message": told})
        for problem in damage:
            self._monitor.event({"event": "damaged_checkpoint", "step": state.step, "message": problem})
        for change in state.data_changes[len(read_state(origin)["data_changes"]) if origin else 0 :]:
            self._monitor.event({"event": "data_change", "step": state.step, "message": f"accepted: {change}"})

    def _tell_missing(self, config: Config, data: RunData, state: TrainState) -> None:
        """Say at the start what of the shards ``data.on_damage: hole`` lets be missing. Collective.

        Raises:
            AgreedError: the run would lose more by it than ``data.max_hole_fraction`` allows.
        """
        mine = [shard for source in (*data.sources, *data.heldout.values()) for shard in source.unusable]
        missing = sorted({shard for part in self._ranks.gather_objects(mine) for shard in part})
        if not missing:
            return
        gone = [
            source.unreadable_shards() if source.unusable else np.empty(0, np.int64)
            for source in (*data.sources, *data.heldout.values())
        ]
        shards = [np.sort(np.concatenate(parts)) for parts in zip(*self._ranks.gather_objects(gone), strict=True)]
        heldout = sum(map(len, shards[len(data.sources) :]))
        place = (state.holes, state.position, end_position(config, state))
        look = partial(look_for_missing, config, data, shards[: len(data.sources)], heldout, *place)
        found = together(self._ranks, lambda: look() if self._ranks.rank == 0 else None)
        if found and self._monitor:
            listed = "; ".join(missing[:3]) + (f"; and {len(missing) - 3} more" if len(missing) > 3 else "")
            counted = f"{told(found)}. " if found.shards or found.heldout_shards else ""
            message = f"{listed}. {counted}What of it neither storage nor the node's cache holds will be holes"
            self._monitor.event({"event": "missing_shards", "step": state.step, "message": message})

    def _tell_kernel(self) -> None:
        """Say at the start what makes the batches, and on which hosts it is the slow way. Collective."""
        made = self._ranks.gather_objects((socket.gethostname(), kernel.describe()))
        if self._ranks.rank == 0:
            print(f"batches are made by {made[0][1]}", flush=True)
            for host, words in sorted({(host, words) for host, words in made if words.startswith("NumPy")}):
                told = f"{host} makes batches more slowly than it could: by {words}"
                print(f"warning: {told}", file=sys.stderr, flush=True)

    def end(self, reason: Reason, code: int, error: BaseException | None = None, signal: str | None = None) -> int:
        """Print why this rank ends, record it in attempts.jsonl; returns ``code``."""
        ranks = self._ranks
        by_all = error is None or isinstance(error, TOGETHER)
        if error is not None and (ranks.rank == 0 or not by_all):
            where = "" if by_all else f"rank {ranks.rank} on {socket.gethostname()}: "
            label = {"stopped": "stopped", "rolled_back": "rollback"}.get(reason, "error")
            print(f"{label}: {where}{error}", file=sys.stderr, flush=True)
        if self._monitor:
            self._monitor.close()
        if self._ledger:
            self._ledger.close()
        self._monitor, self._ledger = None, None
        if reason == "done" and self._trainer and ranks.rank == 0:
            print(
                f"done at step {self._trainer.state.step:,}; `pretrain report {self._folder}` shows the run", flush=True
            )
        if self._folder is None or (by_all and ranks.rank != 0):
            return code
        guilty = error.guilty if isinstance(error, HangError) else ()
        self._record(reason, code, "" if error is None else str(error), signal, guilty)
        return code

    def _record(self, reason: Reason, code: int, message: str, signal: str | None, guilty: Sequence[int]) -> None:
        assert self._folder is not None
        try:
            log, known = AttemptsLog(self._folder), read_attempts(self._folder)
            if len(known) < self._attempt:
                log.start(
                    hosts=[socket.gethostname()],
                    world_size=self._ranks.world_size,
                    versions=versions(),
                    first_step=1,
                    resumed_from=None,
                )
            elif known[-1].reason is not None:
                return  # the rank whose failure ended this one's has said why
            step = self._trainer.state.step if self._trainer else 0
            log.stop(
                self._attempt,
                last_step=step,
                reason=reason,
                exit_code=code,
                message=message,
                signal=signal,
                guilty=guilty,
            )
        except (OSError, UserError) as error:
            print(f"error: {self._folder / 'attempts.jsonl'} could not be written: {error}", file=sys.stderr)


def _identity(weights: Weights) -> dict[str, str]:
    return {"path": str(weights.path), "sha256": weights.identity()}


def _where_it_stands(
    folder: Path, config: Config, state: TrainState, origin: Path | None, beginning: Beginning | None, lost: int
) -> list[str]:
    """What a start says to its user: where, from which step, and what has changed since that checkpoint."""
    if beginning is not None:
        weights = f", with the weights of {beginning.weights.path}" if beginning.weights else ""
        rewound = f", rewound to step {state.step:,}" if state.step else ""
        masks = [f"{source.where}: {len(source.layers)} layers masked" for source in beginning.mask_sources]
        return [f"{folder}: a new run of {config.total_steps:,} steps{weights}{rewound}", *masks]
    assert origin is not None
    said = [f"{folder}: resumes from {origin} at step {state.step:,} of {config.total_steps:,}"]
    if lost:
        said.append(f"{lost:,} steps done after that checkpoint are done again")
    if state.step >= config.total_steps:
        said.append("the run is complete; raise training.steps (or training.tokens) to go on")
    return said + [f"changed since that checkpoint: {change}" for change in config_changes(origin, config)]
