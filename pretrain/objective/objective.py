"""The objective of an optimizer step, micro-step by micro-step, and what the step's metrics need of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline import Batch
from pretrain.distributed import Distributed

from .cross_entropy import sequence_cross_entropy, sequence_squared_log_partition
from .reweighting import relative_weights
from .settings import ObjectiveSettings
from .terms import Term, engine_loss


@dataclass(frozen=True)
class StepStatistics:
    """One optimizer step over all ranks and micro-steps; the same on every rank."""

    objective: float
    """What was minimised, nats."""
    source_losses: tuple[float, ...]
    """Sum of −log p over the labels of each source, nats, unweighted."""
    source_labels: tuple[int, ...]
    """Number of labels of each source."""
    holes: int
    """Positions whose sequence is missing."""
    weights: tuple[Tensor, ...]
    """The relative weights of each group [M], where samples were reweighted."""
    flags: tuple[bool, ...]
    """For each flag given to ``end_step``: whether any rank raised it."""

    @property
    def loss(self) -> float:
        """Unweighted mean over all labels of the global batch, nats."""
        labels = sum(self.source_labels)
        return sum(self.source_losses) / labels if labels else 0.0


@dataclass
class _Step:
    denominators: tuple[float, float]
    holes: int
    reweighted: bool
    objective: Tensor
    losses: Tensor
    labels: Tensor
    weights: list[Tensor] = field(default_factory=list)


class Objective:
    """Cross-entropy with per-sample weights, and the z-loss, each over its one denominator (law 2).

    With l_i the mean loss of sequence i, n_i its labels, u_i its relative weight (``relative_weights``) and c_i = n_i
    (``average: token``) or 1 (``average: sequence``), a step minimises::

        Σ_i u_i c_i l_i / Σ_i c_i  +  z_loss * Σ_it (log Z_it)² / Σ_i n_i

    with both sums over all sequences of the optimizer step.

    Args:
        settings: the ``objective`` section.
        sources: number of sources, for the statistics by source.
        ranks: this process among its peers.
    """

    def __init__(self, settings: ObjectiveSettings, sources: int, ranks: Distributed) -> None:
        self._settings = settings
        self._sources = sources
        self._ranks = ranks
        self._step: _Step | None = None

    def begin_step(self, step: int, micro_batches: Sequence[Batch] | None) -> int | None:
        """Agree on the denominators of optimizer step ``step`` (0-based) from this rank's micro-batches on the CPU.

        Args:
            step: the step. micro_batches: ``None``: this rank has no data and wants to stop.

        Returns:
            how many of the step's sequences are missing, over all ranks; ``None`` if a rank wants to stop instead.
        """
        if micro_batches is None:
            self._ranks.all_reduce(torch.tensor([0, 0, 0, 1], device=self._ranks.device))
            return None
        labels = torch.cat([batch.label_counts for batch in micro_batches])
        missing = torch.cat([batch.sample_ids < 0 for batch in micro_batches])
        counts = torch.stack([labels.sum(), (labels > 0).sum(), missing.sum(), torch.tensor(0)])
        total, sequences, holes, stops = self._ranks.all_reduce(counts.to(self._ranks.device)).tolist()
        if stops:
            return None
        settings = self._settings
        zeros = torch.zeros(2 * self._sources + 1, dtype=torch.float64, device=self._ranks.device)
        self._step = _Step(
            denominators=(float(total if settings.average == "token" else sequences), float(total)),
            holes=holes,
            reweighted=settings.reweighting.strategy != "uniform" and step >= settings.reweighting.start_step,
            objective=zeros[0],
            losses=zeros[1 : 1 + self._sources],
            labels=zeros[1 + self._sources :],
        )
        return int(holes)

    def micro_step(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss to hand to the engine for one micro-batch.

        Args:
            logits: [b, T, V]; batch: on the same device.

        Returns:
            scalar fp32.
        """
        step = self._current()
        losses = sequence_cross_entropy(logits, batch.labels, batch.loss_mask)
        labels = batch.loss_mask.sum(dim=1)
        mean_losses = losses / labels.clamp(min=1)
        by_token = self._settings.average == "token"
        weights = self._weights(mean_losses.detach(), labels if by_token else (labels > 0).long())
        terms = [Term((weights * (losses if by_token else mean_losses)).sum(), step.denominators[0])]
        if self._settings.z_loss:
            squares = sequence_squared_log_partition(logits, batch.loss_mask).sum()
            terms.append(Term(squares, step.denominators[1], self._settings.z_loss))
        loss = engine_loss(terms, self._ranks.world_size)
        step.objective += loss.detach() / self._ranks.world_size
        # a product, for index_add_ on a GPU adds in no fixed order and two equal runs would log different losses
        by_source = F.one_hot(batch.source_ids, self._sources).double()
        step.losses += losses.detach().double() @ by_source
        step.labels += labels.double() @ by_source
        return loss

    def _weights(self, mean_losses: Tensor, counts: Tensor) -> Tensor:
        """This rank's rows of the weights of the group: the micro-step's sequences on all ranks."""
        step = self._current()
        if not step.reweighted:
            return (counts > 0).float()
        # one collective: counts are below 2**24 and so exact in fp32
        group = self._ranks.all_gather(torch.stack([mean_losses, counts.float()], dim=1))
        weights = relative_weights(group[:, 0], group[:, 1], self._settings.reweighting)
        step.weights.append(weights)
        rows = mean_losses.shape[0]
        return weights[self._ranks.rank * rows : (self._ranks.rank + 1) * rows]

    def end_step(self, flags: Sequence[bool] = ()) -> StepStatistics:
        """Reduce the step's statistics, and any rank's ``flags`` with them, in one collective."""
        step = self._current()
        raised = torch.tensor(flags, dtype=torch.float64, device=self._ranks.device)
        parts = torch.cat([step.objective.view(1), step.losses, step.labels, raised])
        values = self._ranks.all_reduce(parts).tolist()
        self._step = None
        first, second = 1 + self._sources, 1 + 2 * self._sources
        return StepStatistics(
            objective=values[0],
            source_losses=tuple(values[1:first]),
            source_labels=tuple(int(value) for value in values[first:second]),
            holes=step.holes,
            weights=tuple(step.weights),
            flags=tuple(value > 0 for value in values[second:]),
        )

    def _current(self) -> _Step:
        assert self._step is not None, "begin_step comes first"
        return self._step
