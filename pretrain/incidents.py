"""What a run does about a step whose update is not made: names it, records it, goes on, goes back or ends."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data_pipeline import Step
from data_pipeline.errors import HeadraceError
from data_pipeline.explain import Reading

from .agreement import together
from .checkpoint import read_state, step_of
from .config import Config
from .data import RunData, stretch_of_run
from .distributed import Distributed
from .engine import Engine
from .monitor import MetricValue, Monitor
from .objective import Objective
from .stability import Incident, Past, without_checkpoint
from .stability.rollbacks import Rollback, record_rollback
from .stability.suspects import Suspect, name_samples, suspicious
from .state import TrainState

PARAMETERS_NAMED = 4


class NonFiniteError(HeadraceError):
    """Loss, gradient or weights are not numbers, and going on is not allowed; nothing of it was saved."""


class SpikeError(HeadraceError):
    """Too many losses were too high to go on; nothing after the last checkpoint was saved."""


class RollbackError(HeadraceError):
    """The run goes back to its newest checkpoint; the positions to leave out are on the disk."""


@dataclass(frozen=True)
class Incidents:
    """Meets the incidents of one attempt, on one rank."""

    config: Config
    data: RunData
    ranks: Distributed
    engine: Engine
    monitor: Monitor | None
    """On rank 0."""
    newest_checkpoint: Callable[[], Path | None]
    """The one that the run would go back to, when none is being written. Collective."""

    def meet(
        self, incident: Incident, past: Past, objective: Objective, step: Step, state: TrainState, holes: int
    ) -> TrainState:
        """The state after a step whose update was left out. Collective.

        Raises:
            NonFiniteError, SpikeError: the run ends here.
            RollbackError: it goes on from its newest checkpoint.
        """
        told = f"{incident.told}, at positions {step.position} to {step.next_position - 1}"
        told += self._suspects(incident, objective, step, state)
        told += f". {incident.rerun}" if incident.rerun else ""
        broken = non_finite_weights(self.engine, self.ranks) if incident.kind == "non_finite" else ""
        if broken and incident.action == "skip":
            incident = replace(incident, action="stop", bound=f"its weights are not finite any more: {broken}")
        origin = self.newest_checkpoint() if incident.action == "rollback" else None
        if incident.action == "rollback" and origin is None:
            incident = without_checkpoint(self.config.stability, past, incident)
        if incident.action == "rollback" and origin is not None:
            self._go_back(incident, origin, step, state, told)
        self._tell(incident, past, step, told)
        if incident.action == "stop":
            raise self._end(incident, past, state, told)
        return state.skip(step.next_position, holes, self.config.stability.skip_window)

    def _suspects(self, incident: Incident, objective: Objective, step: Step, state: TrainState) -> str:
        """The samples that may have done it, in words, from a pass without gradients over the same weights."""
        own: list[Suspect] = []
        self.engine.evaluating(True)
        with torch.no_grad():
            for number, micro_batch in enumerate(step.micro_batches):
                batch = micro_batch.to(self.ranks.device)
                logits, _ = self.engine.training_forward(batch)
                losses = objective.sample_losses(logits, batch).tolist()
                labels, rows = batch.label_counts.tolist(), len(losses)
                sources, positions = batch.source_ids.tolist(), batch.run_positions.tolist()
                own += [
                    Suspect(self.ranks.rank, number * rows + row, positions[row], sources[row], losses[row])
                    for row in range(rows)
                    if labels[row]
                ]
        self.engine.evaluating(False)
        found = suspicious([each for of_rank in self.ranks.gather_objects(own) for each in of_rank], incident.kind)
        if not found:
            return ". No sample's own loss is not finite"
        if self.ranks.rank:
            return ""
        documents = {each.position: self._documents(each, state) for each in found}
        what = "Samples without a finite loss" if incident.kind == "non_finite" else "The highest losses"
        run_folder = None if incident.action == "rollback" else self.config.run_folder  # the step will be another
        return f". {what}: {name_samples(found, self.data.names, documents, run_folder, state.step + 1)}"

    def _documents(self, suspect: Suspect, state: TrainState) -> list[str]:
        stretch = stretch_of_run(self.config, self.data, state.step, state.position, self.ranks.world_size)
        reading = Reading(stretch, self.data.names, self.data.sources, self.data.order)
        try:
            row = reading.row(state.step + 1, (suspect.rank, suspect.row), suspect.position, with_text=False)
        except (HeadraceError, OSError):
            return []  # their table can't be read just now: the position names them too
        return [part.id for part in row.documents]

    def _go_back(self, incident: Incident, origin: Path, step: Step, state: TrainState, told: str) -> None:
        steps, first = self.config.stability.drop_steps, step_of(origin)
        if steps is not None:
            first = max(first, state.step + 1 - steps)
        saved = together(self.ranks, lambda: read_state(origin))
        start = self.config.batch_plan.advance(saved["step"], saved["position"], first)
        rollback = Rollback(
            kind=incident.kind,
            step=state.step + 1,
            resumed_step=saved["step"],
            start=start,
            stop=step.next_position,
            message=told,
        )
        together(self.ranks, lambda: record_rollback(self.config.run_folder, rollback) if self.ranks.rank == 0 else 0)
        raise RollbackError(
            f"step {rollback.step}: {told}. The run goes back to {origin.name} and leaves out the positions {start} to "
            f"{rollback.stop - 1}."
        )

    def _tell(self, incident: Incident, past: Past, step: Step, told: str) -> None:
        if not self.monitor:
            return
        fields: dict[str, MetricValue] = {"action": incident.action, "position": step.position}
        if incident.z is not None:
            fields["robust_z"] = incident.z
        self.monitor.event({"event": incident.kind, "step": past.step, "message": told, **fields})

    def _end(self, incident: Incident, past: Past, state: TrainState, told: str) -> HeadraceError:
        why = f"{incident.bound}. " if incident.bound else ""
        what = f"step {past.step} on {socket.gethostname()}: {told}. {why}Its update was not made, and nothing "
        if incident.kind == "spike":
            return SpikeError(
                f"{what}after the last checkpoint was saved. Look at these samples; if the losses have risen for good, "
                "as after a change of the mixture, raise stability.spike.threshold or set stability.spike=null; else "
                "resume from an earlier checkpoint with a lower optimizer.lr."
            )
        return NonFiniteError(
            f"{what}after step {state.step} was saved. Look at these samples, or resume with a lower optimizer.lr or a "
            "smaller optimizer.clip_norm."
        )


def non_finite_weights(engine: Engine, ranks: Distributed) -> str:
    """The parameters whose weights or optimizer state are not finite, in words; "" if all are. Collective."""
    names = sorted({name for of_rank in ranks.gather_objects(engine.non_finite()) for name in of_rank})
    more = f" and {len(names) - PARAMETERS_NAMED} more" if len(names) > PARAMETERS_NAMED else ""
    return ", ".join(names[:PARAMETERS_NAMED]) + more
