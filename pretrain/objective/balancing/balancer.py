"""The losses on routers in one optimizer step, and what the step says of its routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pretrain.distributed import Distributed
from pretrain.model.experts.statistics import Routing

from ..terms import Term
from .base import RouterLossSettings
from .frequencies import Saved, StepFrequencies, shares
from .kinds.load_balance import LoadBalanceSettings
from .settings import BalancingSettings


@dataclass(frozen=True)
class RoutingStatistics:
    """The routing of one optimizer step over all ranks and micro-steps; the same on every rank. Plain counts of the
    tokens that have labels, [L, ...] by the blocks with experts."""

    loads: npt.NDArray[np.int64]
    """[L, S, E] slots by source and expert, before any was dropped."""
    tokens: int
    """In each block."""
    shannon: npt.NDArray[np.float64]
    """[L] mean Shannon entropy of the routers' distributions, nats."""
    dropped: npt.NDArray[np.int64]
    """[L] slots that found no room."""
    losses: dict[str, float]
    """Of each loss on routers, by its label: its value without coefficient, the mean over the blocks."""
    frequencies: dict[str, list[list[float]]]
    """For the next step: of the losses that need those of the steps before."""


class Balancer:
    """The losses on routers of one optimizer step.

    A step is a :meth:`score` of every micro-step where ``scores_first``, :meth:`terms` of every micro-step, and
    :meth:`collected`, whose reduction over the ranks :meth:`statistics` reads.

    Args:
        settings: the ``objective.balancing`` section.
        step: the optimizer step (from 0).
        labels: of the whole step: what losses are means over.
        micro_steps: of the step.
        ranks: this process among its peers.
        saved: ``frequencies`` of the step before.
    """

    def __init__(
        self, settings: BalancingSettings, step: int, labels: float, micro_steps: int, ranks: Distributed, saved: Saved
    ) -> None:
        coefficients = [(loss, loss.coefficient_at(step)) for loss in settings.losses]
        self._losses = [(loss, coefficient) for loss, coefficient in coefficients if coefficient]
        self._labels = labels
        self.weighs_samples = settings.sample_weights and bool(self._losses)
        # what remembers earlier steps does so where its coefficient is 0 yet, too
        needed = [
            loss
            for loss, coefficient in coefficients
            if isinstance(loss, LoadBalanceSettings)
            and (coefficient or (loss.way in ("previous_step", "running") and not loss.off))
        ]
        self._frequencies = StepFrequencies(needed, micro_steps, ranks, saved)
        self._counts: Tensor | None = None
        self._choices: Tensor | None = None
        self._values: Tensor | None = None
        self._shape, self._sources = (0, 0, 0), 0

    @property
    def scores_first(self) -> bool:
        """Whether every micro-step has to be given to :meth:`score` before the first :meth:`terms`."""
        return self._frequencies.scores_first

    def score(self, routing: Routing, weights: Tensor | None = None) -> None:
        """Take note of a micro-step's choices, from a pass without gradients; counts nothing else (law 3)."""
        self._frequencies.score(_weighted(routing.choices, weights))

    def terms(self, routing: Routing, weights: Tensor | None, by_source: Tensor) -> list[Term]:
        """The losses of a micro-step, and note of what it counts.

        Args:
            routing: [L, b, ...], with gradient.
            weights: [b], what each sequence counts in the losses; None: all count the same.
            by_source: [b, S] float64, 1 at each sequence's source.
        """
        choices = _weighted(routing.choices, weights)
        self._frequencies.begin_micro_step(choices)
        terms = []
        for loss, coefficient in self._losses:
            rows = loss.rows(routing, self._of(loss, routing, weights))
            rows = rows if weights is None else rows * weights
            terms.append(Term(rows.sum(), self._labels, coefficient))
        self._take_note(routing, choices, by_source, [term.numerator for term in terms])
        return terms

    def _of(self, loss: RouterLossSettings, routing: Routing, weights: Tensor | None) -> Tensor | None:
        """f of a loss: [L, E], or [L, b, E] where each sequence has its own."""
        if not isinstance(loss, LoadBalanceSettings):
            return None
        if loss.level == "sequence":
            return shares(routing.choices)
        if loss.level == "micro_batch":
            return shares(_weighted(routing.choices, weights)).to(routing.packed.dtype)
        return self._frequencies.of(loss, routing.choices)

    def _take_note(self, routing: Routing, choices: Tensor, by_source: Tensor, numerators: Sequence[Tensor]) -> None:
        loads = torch.einsum("lbe,bs->lse", routing.loads.detach().double(), by_source)
        scalars = torch.stack([routing.tokens, routing.shannon, routing.dropped]).detach().double().sum(dim=2)
        counts = torch.cat([loads.flatten(), scalars.flatten()])
        values = torch.stack([value.detach().double() for value in numerators]) if numerators else counts[:0]
        if self._counts is None:
            layers, batch, experts = routing.choices.shape
            self._shape, self._sources = (layers, batch, experts), by_source.shape[1]
            self._counts, self._choices, self._values = counts, choices, values
        else:
            assert self._choices is not None
            assert self._values is not None
            self._counts, self._choices = self._counts + counts, self._choices + choices
            self._values = self._values + values

    def collected(self) -> Tensor:
        """What this rank has counted in the step, float64, to be summed over the ranks; empty without experts."""
        if self._counts is None:
            return torch.zeros(0, dtype=torch.float64)
        assert self._choices is not None
        assert self._values is not None
        return torch.cat([self._counts, self._choices.flatten(), self._values])

    def statistics(self, reduced: npt.NDArray[np.float64]) -> RoutingStatistics | None:
        """From :meth:`collected`, summed over the ranks; None without experts."""
        if self._counts is None:
            return None
        (layers, _, experts), sources = self._shape, self._sources
        sizes = np.cumsum([layers * sources * experts, layers, layers, layers, layers * experts])
        loads, tokens, shannon, dropped, choices, values = np.split(reduced, sizes)
        count = int(tokens[0])
        labels = [loss.label for loss, _ in self._losses]
        return RoutingStatistics(
            loads=loads.reshape(layers, sources, experts).astype(np.int64),
            tokens=count,
            shannon=shannon / max(count, 1),
            dropped=dropped.astype(np.int64),
            losses={
                label: float(value) / self._labels / layers if self._labels else 0.0
                for label, value in zip(labels, values, strict=True)
            },
            frequencies=self._frequencies.save(torch.from_numpy(choices.reshape(layers, experts))),
        )


def _weighted(choices: Tensor, weights: Tensor | None) -> Tensor:
    """Σ_s u_s choices_s: [L, b, E] and [b] -> [L, E] float64."""
    counts = choices.detach().double()
    return counts.sum(dim=1) if weights is None else torch.einsum("lbe,b->le", counts, weights.double())
