"""The groups over which an optimizer step's weights are normalised, and when each can know what (``group``).

A :class:`Weigher` lives for one optimizer step. It is asked for the weights of this rank's sequences micro-step by
micro-step, and in the end for what all ranks' samples got. Between the two the host waits for nothing: all is computed
on the device, and read when the step is over.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.distributed import Distributed

from .reweighting import Samples, log_importances, log_mean_importance, relative_weights
from .settings import ReweightingSettings

FARTHEST = 60.0
"""One pass: how far, in nats, an importance may be from the mean of the step before; gradients are accumulated on that
scale, and must neither overflow nor vanish. Only r below 1/60 can make the importances differ that much, or a sample
that a strategy without temperature would leave out anyway."""


@dataclass(frozen=True)
class LossRange:
    """What a one-pass step needs of the step before it; part of the run's state."""

    lowest: float
    """Lowest loss of the global batch, nats."""
    highest: float
    """Highest loss of the global batch, nats."""
    log_mean_importance: float
    """Of that step's samples, under its own range and the next step's temperature: the scale on which the next step
    accumulates gradients, until it knows its own."""


class Dropped(NamedTuple):
    """A sequence left out because its loss was not finite."""

    rank: int
    row: int
    """Of that rank's rows in the step, counted over its micro-batches."""
    position: int
    """In the run."""
    source: int


@dataclass(frozen=True)
class StepWeights:
    """The samples of an optimizer step and their weights; the same on every rank. On the device."""

    weights: Tensor
    """[groups, M] fp32, relative."""
    samples: Samples
    """Of [groups, M]: in a group by rank, then by row."""

    def dropped(self, world_size: int) -> list[Dropped]:
        """The dropped sequences; reads from the device."""
        rows = self.weights.shape[1] // world_size
        found = []
        for group, place in self.samples.dropped.nonzero().tolist():
            rank, row = divmod(place, rows)
            position, source = (int(column[group, place]) for column in (self.samples.positions, self.samples.sources))
            found.append(Dropped(rank, group * rows + row, position, source))
        return sorted(found)


class Weigher(ABC):
    """The weights of one optimizer step.

    Args:
        settings: strategy and cap.
        temperature: of this step; infinite: nothing is weighed, :meth:`weigh` only keeps count.
        micro_steps: of the step.
        ranks: this process among its peers.
    """

    scores_first = False
    """Whether :meth:`score` has to be given every micro-step's samples before the first :meth:`weigh`."""

    def __init__(self, settings: ReweightingSettings, temperature: float, micro_steps: int, ranks: Distributed) -> None:
        self.active = math.isfinite(temperature)
        self._settings, self._temperature = settings, temperature
        self._micro_steps, self._ranks = micro_steps, ranks
        self._groups: list[tuple[Samples, Tensor]] = []

    def score(self, own: Samples) -> None:
        """Take note of this rank's samples of one micro-step, from a pass without gradients."""
        raise NotImplementedError(f"{type(self).__name__} needs no scoring pass")

    @abstractmethod
    def weigh(self, own: Samples) -> Tensor:
        """Relative weights [b], fp32, of this rank's samples [b] of the next micro-step."""

    def gradient_factor(self) -> Tensor | None:
        """What the step's accumulated gradients still have to be multiplied by; None: nothing. After the last
        :meth:`weigh`, once. Collective."""
        return None

    def result(self) -> StepWeights:
        """The whole step's weights. After :meth:`gradient_factor`."""
        assert self._groups, "gradient_factor comes first"
        samples, weights = zip(*self._groups, strict=True)
        return StepWeights(torch.stack(weights), Samples(*map(torch.stack, zip(*samples, strict=True))))

    def _gather(self, own: Samples) -> Samples:
        """All ranks' samples, in rank order, in one collective."""
        return Samples(*self._ranks.all_gather(torch.stack(own, dim=1)).unbind(1))

    def _own(self, weights: Tensor) -> Tensor:
        """This rank's part of a group's weights."""
        return weights.view(self._ranks.world_size, -1)[self._ranks.rank]


class MicroStepWeigher(Weigher):
    """Each micro-step's sequences on all ranks are a group (the paper's code): one gather a micro-step."""

    def weigh(self, own: Samples) -> Tensor:
        group = self._gather(own)
        logs = log_importances(group, self._settings.strategy, self._temperature)
        weights = relative_weights(logs, group, self._settings.cap)
        self._groups.append((group, weights))
        return self._own(weights)


class GlobalBatchWeigher(Weigher):
    """The whole optimizer step is one group, whose losses a scoring pass has found: one gather a step."""

    scores_first = True

    def __init__(self, settings: ReweightingSettings, temperature: float, micro_steps: int, ranks: Distributed) -> None:
        super().__init__(settings, temperature, micro_steps, ranks)
        self._scored: list[Samples] = []
        self._weighed = 0

    def score(self, own: Samples) -> None:
        self._scored.append(own)

    def own_weights(self) -> Tensor:
        """Relative weights [micro-steps, b] of all this rank's samples, as :meth:`weigh` will give them."""
        if not self._groups:
            assert len(self._scored) == self._micro_steps, "every micro-step is scored before the first is weighed"
            group = self._gather(_joined(self._scored))
            logs = log_importances(group, self._settings.strategy, self._temperature)
            self._groups.append((group, relative_weights(logs, group, self._settings.cap)))
        return self._own(self._groups[0][1]).view(self._micro_steps, -1)

    def weigh(self, own: Samples) -> Tensor:
        weights = self.own_weights()[self._weighed]
        self._weighed += 1
        return weights


class OnePassWeigher(Weigher):
    """The whole optimizer step is one group, weighed before all its losses are known: one gather a step.

    An importance follows from a sample's own loss: the range is that of the step before, or the strategy needs none.
    The normaliser needs all samples: with one micro-step it is known before the backward pass; with several, gradients
    are accumulated on the scale of the step before and multiplied by :meth:`gradient_factor` in the end.

    Args:
        previous: of the optimizer step before; None: there is none, and all samples weigh the same where the strategy
            needs a range.
    """

    def __init__(
        self,
        settings: ReweightingSettings,
        temperature: float,
        micro_steps: int,
        ranks: Distributed,
        previous: LossRange | None,
    ) -> None:
        super().__init__(settings, temperature, micro_steps, ranks)
        self._previous = previous
        self._seen: list[Samples] = []

    def weigh(self, own: Samples) -> Tensor:
        self._seen.append(own)
        if not self.active:
            return (own.counts > 0).float()
        if self._micro_steps == 1:
            group = self._gather(own)
            self._groups.append((group, relative_weights(self._logs(group), group)))
            return self._own(self._groups[0][1])
        return self._logs(own).exp().float()

    def gradient_factor(self) -> Tensor | None:
        if self._groups:
            return None
        group = self._gather(_joined(self._seen))
        if not self.active:
            self._groups.append((group, (group.counts > 0).float()))
            return None
        provisional = self._logs(group).exp()
        # at least what the farthest sample counts, but for a step in which none takes part
        normaliser = (provisional * group.counts).sum().clamp(min=math.exp(-FARTHEST))
        factor = group.counts.sum() / normaliser
        self._groups.append((group, (provisional * factor).float()))
        return factor

    def loss_range(self, next_temperature: float) -> Tensor:
        """What :class:`LossRange` holds of this step, [3] float64; infinite where no sample took part."""
        group, _ = self._groups[0]
        lowest, highest = group.loss_range()
        logs = log_importances(group, self._settings.strategy, next_temperature, (lowest, highest))
        return torch.stack([lowest, highest, log_mean_importance(logs, group)])

    def _logs(self, samples: Samples) -> Tensor:
        """Importances relative to the step before, whose mean is 0 here."""
        strategy, previous = self._settings.strategy, self._previous
        if previous is None and strategy.has_range:
            return log_importances(samples, strategy, math.inf)
        known = previous or LossRange(0.0, 0.0, 0.0)
        within = samples.losses.new_full((), known.lowest), samples.losses.new_full((), known.highest)
        logs = log_importances(samples, strategy, self._temperature, within)
        near = (logs - known.log_mean_importance).clamp(-FARTHEST, FARTHEST)
        return torch.where(samples.valid, near, -math.inf)


def _joined(micro_steps: list[Samples]) -> Samples:
    return Samples(*map(torch.cat, zip(*micro_steps, strict=True)))


def make_weigher(
    settings: ReweightingSettings, step: int, micro_steps: int, ranks: Distributed, previous: LossRange | None
) -> Weigher | None:
    """The weigher of optimizer step ``step`` (from 0); None where no sample's loss is needed.

    Args:
        settings: the ``objective.reweighting`` section.
        micro_steps: of the step.
        ranks: this process among its peers.
        previous: for ``global_batch_one_pass``: of the step before; None: there is none.
    """
    temperature = settings.temperature_at(step)
    if settings.off or (math.isinf(temperature) and settings.group != "global_batch_one_pass"):
        return None
    match settings.group:
        case "micro_step":
            return MicroStepWeigher(settings, temperature, micro_steps, ranks)
        case "global_batch":
            return GlobalBatchWeigher(settings, temperature, micro_steps, ranks)
        case "global_batch_one_pass":
            return OnePassWeigher(settings, temperature, micro_steps, ranks, previous)
