"""The objective of an optimizer step, micro-step by micro-step, and what the step's metrics need of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data_pipeline import Batch
from pretrain.distributed import Distributed
from pretrain.model.experts.statistics import Routing

from .balancing.balancer import Balancer, RoutingStatistics
from .balancing.frequencies import Saved
from .cross_entropy import only_gradient_of, sequence_squared_log_partition
from .groups import Dropped, GlobalBatchWeigher, LossRange, OnePassWeigher, StepWeights, Weigher, make_weigher
from .reweighting import Samples, token_weights
from .settings import ObjectiveSettings
from .terms import Term, engine_loss


@dataclass(frozen=True)
class StepStatistics:
    """One optimizer step over all ranks and micro-steps; the same on every rank."""

    objective: float
    """What was minimised, in the unit of the loss (of cross-entropy: nats)."""
    source_losses: tuple[float, ...]
    """Sum of the loss over the labels of each source, unweighted; without dropped sequences."""
    source_labels: tuple[int, ...]
    """Number of labels of each source; without those of dropped sequences."""
    holes: int
    """Positions whose sequence is missing."""
    flags: tuple[bool, ...] = ()
    """For each flag given to ``end_step``: whether any rank raised it."""
    weights: StepWeights | None = None
    """Where samples were reweighted."""
    temperature: float = math.inf
    """r of the step; infinite where samples were not reweighted, or by a strategy without."""
    dropped: tuple[Dropped, ...] = ()
    """Sequences left out because their loss was not finite."""
    loss_range: LossRange | None = None
    """For the next step of a one-pass group."""
    routing: RoutingStatistics | None = None
    """Of a model with experts."""
    gradient_norm: float = math.nan
    """Before clipping, where it was given to ``end_step``."""

    @property
    def loss(self) -> float:
        """Unweighted mean over all labels of the global batch but those of dropped sequences."""
        labels = sum(self.source_labels)
        return sum(self.source_losses) / labels if labels else math.nan if self.dropped else 0.0


@dataclass
class _Step:
    number: int
    denominators: tuple[float, float]
    holes: int
    weigher: Weigher | None
    balancer: Balancer
    previous: LossRange | None
    objective: Tensor
    losses: Tensor
    labels: Tensor
    factor: Tensor | None = None
    scored: list[Routing] = field(default_factory=list)
    """How the micro-steps of a scoring pass were routed, until the balancer takes note of it."""


def scores_first(settings: ObjectiveSettings, step: int, micro_steps: int) -> bool:
    """Whether optimizer step ``step`` (from 0), of so many micro-steps, will have a scoring pass."""
    alone = Distributed(0, 1, torch.device("cpu"))
    weigher = make_weigher(settings.reweighting, step, micro_steps, alone, None)
    return _need_scores(weigher, Balancer(settings.balancing, step, 1.0, micro_steps, alone, {}))


def _need_scores(weigher: Weigher | None, balancer: Balancer) -> bool:
    return balancer.scores_first or (weigher is not None and weigher.scores_first)


class Objective:
    """The loss with per-sample weights, PaLM's z-loss and losses on routers, each over its one denominator (law 2).

    With l_i the mean loss of sequence i, n_i its labels, u_i its relative weight (``relative_weights``) and c_i = n_i
    (``average: token``) or 1 (``average: sequence``), a step minimises::

        Σ_i u_i c_i l_i / Σ_i c_i  +  z_loss * Σ_it (log Z_it)² / Σ_i n_i  +  Σ_j coefficient_j Σ_i rows_ji / Σ_i n_i

    with the sums over all sequences of the optimizer step. Where the strategy weighs tokens, l_i in the first sum is
    the mean of v_it l_it with v of mean 1 (``token_weights``). A step is ``begin_step``, where ``scores_first`` a
    ``score`` of every micro-batch, a ``micro_step`` of every micro-batch, ``gradient_factor``, ``end_step``.

    Args:
        settings: the ``objective`` section.
        sources: number of sources, for the statistics by source.
        ranks: this process among its peers.
    """

    def __init__(self, settings: ObjectiveSettings, sources: int, ranks: Distributed) -> None:
        self._settings = settings
        self._sources = torch.arange(sources, device=ranks.device)
        self._ranks = ranks
        self._step: _Step | None = None

    def begin_step(
        self,
        step: int,
        micro_batches: Sequence[Batch] | None,
        previous: LossRange | None = None,
        frequencies: Saved | None = None,
    ) -> int | None:
        """Agree on the denominators of optimizer step ``step`` (0-based) from this rank's micro-batches on the CPU.

        Args:
            step: the step.
            micro_batches: ``None``: this rank has no data and wants to stop, or can't read it.
            previous: ``loss_range`` of the step before; ``None``: there is none.
            frequencies: ``routing.frequencies`` of the step before; ``None``: there is none.

        Returns:
            how many of the step's sequences are missing, over all ranks; ``None`` if a rank has no data.
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
        settings, sources, micro_steps = self._settings, len(self._sources), len(micro_batches)
        zeros = torch.zeros(2 * sources + 1, dtype=torch.float64, device=self._ranks.device)
        self._step = _Step(
            number=step,
            denominators=(float(total if settings.average == "token" else sequences), float(total)),
            holes=holes,
            weigher=make_weigher(settings.reweighting, step, micro_steps, self._ranks, previous),
            balancer=Balancer(settings.balancing, step, float(total), micro_steps, self._ranks, frequencies or {}),
            previous=previous,
            objective=zeros[0],
            losses=zeros[1 : 1 + sources],
            labels=zeros[1 + sources :],
        )
        return int(holes)

    @property
    def scores_first(self) -> bool:
        """Whether this step needs a ``score`` of every micro-batch before the first ``micro_step``."""
        step = self._current()
        return _need_scores(step.weigher, step.balancer)

    def score(self, output: Tensor, batch: Batch, packed: Tensor | None = None) -> None:
        """Take note of a micro-batch's losses and of how it was routed; counts nothing else (law 3).

        Args:
            output: as of :meth:`micro_step`, without gradient, of a model in evaluation mode.
            batch: on the same device.
            packed: ``Outputs.routing``.
        """
        step = self._current()
        routing = None if packed is None else Routing(packed)
        if step.weigher is not None and step.weigher.active:
            own, _ = self._samples(self._settings.loss.of_tokens(output, batch.labels, batch.loss_mask), batch)
            if step.weigher.scores_first:
                step.weigher.score(own)
            routing = None if routing is None else routing.without(own.dropped)
        if routing is not None and step.balancer.scores_first:
            step.scored.append(routing)

    def micro_step(self, output: Tensor, batch: Batch, packed: Tensor | None = None) -> Tensor:
        """The loss to hand to the engine for one micro-batch.

        Args:
            output: logits [b, T, V], or what else the loss takes (``LossSettings.of_tokens``).
            batch: on the same device.
            packed: ``Outputs.routing``; None for a model without experts.

        Returns:
            scalar fp32.
        """
        step, settings = self._current(), self._settings
        by_token = settings.average == "token"
        of_tokens = settings.loss.of_tokens(output, batch.labels, batch.loss_mask)
        losses = of_tokens.sum(dim=1)
        squares = sequence_squared_log_partition(output, batch.loss_mask) if settings.z_loss else None
        labels = batch.loss_mask.sum(dim=1)
        weights, weighed = (labels > 0).float(), losses
        routing = None if packed is None else Routing(packed)
        self._balance_scored(step)
        if step.weigher is not None:
            own, within = self._samples(of_tokens.detach(), batch)
            weights = step.weigher.weigh(own)
            if step.weigher.active and within is not None:
                weighed = (within * of_tokens).sum(dim=1)
        if step.weigher is not None and step.weigher.active:
            dropped = ~losses.detach().isfinite()
            only_gradient_of(output, batch.loss_mask & ~dropped[:, None])
            losses, weighed, labels = (each.masked_fill(dropped, 0) for each in (losses, weighed, labels))
            squares = None if squares is None else squares.masked_fill(dropped, 0.0)
            routing = None if routing is None else routing.without(dropped)
        numerators = weighed if by_token else weighed / labels.clamp(min=1)
        terms = [Term((weights * numerators).sum(), step.denominators[0])]
        if squares is not None:
            terms.append(Term(squares.sum(), step.denominators[1], settings.z_loss))
        # a product, for index_add_ on a GPU adds in no fixed order and two equal runs would log different losses
        by_source = (batch.source_ids[:, None] == self._sources).double()
        if routing is not None:
            terms += step.balancer.terms(routing, weights if step.balancer.weighs_samples else None, by_source)
        loss = engine_loss(terms, self._ranks.world_size)
        step.objective += loss.detach() / self._ranks.world_size
        step.losses += losses.detach().double() @ by_source
        step.labels += labels.double() @ by_source
        return loss

    def sample_losses(self, output: Tensor, batch: Batch) -> Tensor:
        """The mean loss of each sequence [b] fp64, 0 where it has no label; counts nothing (law 3).

        Args:
            output: as of :meth:`micro_step`, without gradient.
            batch: on the same device.
        """
        losses = self._settings.loss.of_tokens(output, batch.labels, batch.loss_mask).double().sum(dim=1)
        return losses / batch.loss_mask.sum(dim=1).clamp(min=1)

    def _balance_scored(self, step: _Step) -> None:
        """Hand the balancer what the scoring pass has routed, once all of it is there and can be weighed."""
        weights: Sequence[Tensor | None] = [None] * len(step.scored)
        if step.scored and step.balancer.weighs_samples and isinstance(step.weigher, GlobalBatchWeigher):
            weights = list(step.weigher.own_weights())
        for routing, own in zip(step.scored, weights, strict=True):
            step.balancer.score(routing, own)
        step.scored.clear()

    def _samples(self, losses: Tensor, batch: Batch) -> tuple[Samples, Tensor | None]:
        """This rank's samples of a micro-batch, from the losses of its tokens [b, T] without gradient; and where the
        strategy weighs tokens, how each sequence's weight is shared among them, [b, T]."""
        strategy, labels = self._settings.reweighting.strategy, batch.loss_mask.sum(dim=1)
        counts = (labels if self._settings.average == "token" else labels > 0).double()
        means = (losses.sum(dim=1) / labels.clamp(min=1)).double()
        within, importances = None, torch.zeros_like(means)
        if strategy.weighs_tokens:
            temperature = self._settings.reweighting.temperature
            within, importances = token_weights(losses, batch.loss_mask, strategy, temperature)
        known = means, counts, batch.source_ids.double(), batch.run_positions.double(), importances
        return Samples(*known), within

    def own_sums(self) -> Tensor:
        """This rank's share of the objective and its losses by source so far, [1 + sources] on the device."""
        step = self._current()
        return torch.cat([step.objective.view(1), step.losses])

    def gradient_factor(self) -> Tensor | None:
        """What the gradients that the step has accumulated have to be multiplied by before they are used, a scalar on
        the device; None: they are as they should be. After the last ``micro_step``, once. Collective."""
        step = self._current()
        step.factor = step.weigher.gradient_factor() if step.weigher is not None else None
        return step.factor

    def end_step(self, flags: Sequence[bool] = (), gradient_norm: Tensor | float | None = None) -> StepStatistics:
        """Reduce the step's statistics, and any rank's ``flags`` with them, in one collective.

        Args:
            flags: raised on this rank.
            gradient_norm: as this rank has it; the mean over the ranks is the same where they agree, and not finite
                where any of them isn't.
        """
        step = self._current()
        raised = torch.tensor(flags, dtype=torch.float64, device=self._ranks.device)
        objective = step.objective if step.factor is None else step.objective * step.factor
        routed = step.balancer.collected().to(self._ranks.device)
        norm = torch.as_tensor(math.nan if gradient_norm is None else gradient_norm, dtype=torch.float64)
        figures = torch.cat([objective.view(1), norm.to(self._ranks.device).view(1)])
        plain = torch.cat([figures, step.losses, step.labels, raised])
        reduced = self._ranks.all_reduce(torch.cat([plain, routed]))
        weights, extra = self._weights(step)
        # the only place where the host waits for the device
        read = torch.cat([reduced, extra]).cpu()
        values, told = read[: len(plain)].tolist(), read[len(reduced) :].tolist()
        self._step = None
        first = len(figures) + len(self._sources)
        second = first + len(self._sources)
        return StepStatistics(
            objective=values[0],
            source_losses=tuple(values[len(figures) : first]),
            source_labels=tuple(int(value) for value in values[first:second]),
            holes=step.holes,
            flags=tuple(value > 0 for value in values[second:]),
            weights=weights,
            temperature=self._temperature_of(step.number),
            dropped=tuple(weights.dropped(self._ranks.world_size)) if weights is not None and told[0] else (),
            loss_range=self._loss_range(step, told[1:]),
            routing=step.balancer.statistics(read[len(plain) : len(reduced)].numpy()),
            # exact: a sum of a few equal fp32 numbers fits into float64
            gradient_norm=values[1] / self._ranks.world_size,
        )

    def _temperature_of(self, step: int) -> float:
        reweighting = self._settings.reweighting
        return reweighting.temperature_at(step) if reweighting.strategy.has_temperature else math.inf

    def _weights(self, step: _Step) -> tuple[StepWeights | None, Tensor]:
        """The step's weights where it had some; and on the device how many samples it dropped, and its loss range."""
        if step.weigher is None:
            return None, step.objective.new_zeros(1)
        weights = step.weigher.result()
        told = weights.samples.dropped.sum().double().view(1)
        if isinstance(step.weigher, OnePassWeigher):
            following = self._settings.reweighting.temperature_at(step.number + 1)
            told = torch.cat([told, step.weigher.loss_range(following)])
        return (weights, told) if step.weigher.active else (None, told)

    def _loss_range(self, step: _Step, told: Sequence[float]) -> LossRange | None:
        """The range for the next step of a one-pass group; where no sample had a loss, the one before stays."""
        if not told:
            return None
        return LossRange(*told) if all(map(math.isfinite, told)) else step.previous

    def _current(self) -> _Step:
        assert self._step is not None, "begin_step comes first"
        return self._step
