"""Loss-based sample reweighting (Sow et al., ICLR 2025, arXiv 2502.06733): the weights of one group of samples.

The paper's weights w sum to 1 over a group. Here they are *relative*: u = 1 for every sample is the uniform
objective, and they are scaled so that the group's weighted count ``Σ u c`` equals its plain count ``Σ c`` (c = labels
of a sequence for the token average, 1 for the sequence average). With equal counts u = M w, the paper's; with ragged
sequences the group still keeps its share of the step, so that the one denominator is known before the first backward.

Everything is float64 and stays on the device: no function here makes the host wait for it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .base import StrategySettings


class Samples(NamedTuple):
    """What the ranks tell each other of their sequences; all of one shape, float64 (which holds positions exactly)."""

    losses: Tensor
    """Mean −log p over the labels, nats; NaN or infinite where the model's output was."""
    counts: Tensor
    """What each sequence counts in the denominator; 0 without labels."""
    sources: Tensor
    """Index of the source."""
    positions: Tensor
    """Position in the run."""
    log_importances: Tensor
    """Logarithm of the mean importance of a sequence's tokens, where the strategy weighs tokens; else unused."""

    @property
    def valid(self) -> Tensor:
        """Whether a sequence takes part: it has labels, and a loss."""
        return (self.counts > 0) & self.losses.isfinite()

    @property
    def dropped(self) -> Tensor:
        """Whether a sequence has labels, but a loss that is not finite."""
        return (self.counts > 0) & ~self.losses.isfinite()

    def loss_range(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest loss of the sequences that take part; infinite, the wrong way round, where none does."""
        valid = self.valid
        lowest, highest = (torch.where(valid, self.losses, end) for end in (math.inf, -math.inf))
        return lowest.amin(), highest.amax()


def log_importances(
    samples: Samples, strategy: StrategySettings, temperature: float, within: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Logarithm of each sample's importance, not normalised: [M], -inf where it takes no part.

    Args:
        within: lowest and highest loss of the range in which the losses are placed; None: their own.
    """
    if math.isinf(temperature):
        logs = torch.zeros_like(samples.losses)
    elif strategy.weighs_tokens:
        logs = samples.log_importances
    else:
        logs = strategy.log_importances(samples.losses, *(within or samples.loss_range()), temperature)
    return torch.where(samples.valid, logs, -math.inf)


def token_weights(
    losses: Tensor, labelled: Tensor, strategy: StrategySettings, temperature: float
) -> tuple[Tensor, Tensor]:
    """How the weight of each sequence is shared among its tokens, and the sequences' own importances.

    Args:
        losses: [b, T], nats, without gradient; labelled: [b, T] bool.

    Returns:
        [b, T] fp32, whose mean over a sequence's labels is 1, 0 elsewhere; and [b] float64, the logarithm of the mean
        importance of its tokens, without meaning where it has no label.
    """
    nothing = losses.new_zeros((), dtype=torch.float64)
    logs = strategy.log_importances(losses.double(), nothing, nothing, temperature)
    logs = torch.where(labelled, logs, -math.inf)
    means = logs.logsumexp(dim=1) - labelled.sum(dim=1).clamp(min=1).double().log()
    return torch.where(labelled, (logs - means[:, None]).exp(), 0.0).float(), means


def relative_weights(logs: Tensor, samples: Samples, cap: float | None = None) -> Tensor:
    """Relative weights of one group, normalised over it. With e the importances, all sums over the group::

        u_i = min(cap, t e_i), where t is such that Σ_j c_j u_j = Σ_j c_j

    Without a cap t = Σ_j c_j / Σ_j c_j e_j. Samples whose loss is not finite get 0, and keep their c in Σ_j c_j: the
    group has the same share of the step whether or not samples were dropped from it.

    Args:
        logs: [M], :func:`log_importances`.
        samples: of [M]. cap: at least 1.

    Returns:
        [M] fp32; exactly 1 where all importances are equal and nothing was dropped; 0 where ``logs`` is -inf.
    """
    counts = torch.where(samples.valid, samples.counts, 0.0)
    total = samples.counts.sum()
    # a group in which no sample takes part has no largest importance
    logs = logs - logs.amax().clamp(min=torch.finfo(torch.float64).min)
    if cap is None:
        importances = logs.exp()
        # at least the count of the largest, but for a group in which no sample takes part
        normaliser = (importances * counts).sum().clamp(min=1.0)
        return (importances * (total / normaliser)).float()
    return (logs + _log_level(logs, counts, total, cap)).clamp(max=math.log(cap)).exp().float()


def _log_level(logs: Tensor, counts: Tensor, total: Tensor, cap: float) -> Tensor:
    """log t of :func:`relative_weights`, in closed form (water-filling).

    Were the k samples of the largest importance at the cap, the others would need t_k = (Σ c - cap Σ_{capped} c) /
    Σ_{others} c e. Because Σ c min(cap, t e) is at most cap Σ_{capped} c + t Σ_{others} c e for every such division,
    and equal to it for the right one, t is the largest of the t_k.
    """
    order = logs.argsort(descending=True)
    counts = counts[order]
    masses = logs[order] + counts.log()
    others = masses.flip(0).logcumsumexp(0).flip(0)
    room = total - cap * (counts.cumsum(0) - counts)
    # the sorted end: samples that take no part
    levels = torch.where((room > 0) & others.isfinite(), room.clamp(min=0.0).log() - others, -math.inf)
    return levels.amax()


def log_mean_importance(logs: Tensor, samples: Samples) -> Tensor:
    """log(Σ c e / Σ c) over the samples that take part; NaN where none does."""
    counts = torch.where(samples.valid, samples.counts, 0.0)
    return (logs + counts.log()).logsumexp(0) - counts.sum().log()
