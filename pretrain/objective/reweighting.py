"""Loss-based sample reweighting (Sow et al., ICLR 2025, arXiv 2502.06733): the weights of one group of samples.

The paper's weights w sum to 1 over a group. Here they are *relative*: u = 1 for every sample is the uniform
objective, and they are scaled so that the group's weighted count ``Σ u c`` equals its plain count ``Σ c`` (c = labels
of a sequence for the token average, 1 for the sequence average). With equal counts u = M w, the paper's; with ragged
sequences the group still keeps its share of the step, so that the one denominator is known before the first backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .settings import ReweightingSettings


def _linupper(h: Tensor) -> Tensor:
    """The paper's LinUpper: s(h) = min(h + 1, 1) rises over the lower half of the loss range and is flat above."""
    return torch.clamp(h + 1.0, max=1.0)


STRATEGIES: dict[str, Callable[[Tensor], Tensor]] = {"linupper": _linupper}
"""From the normalised loss h in [-1, 1] to the score s in [0, 1]; ``uniform`` bypasses the scores altogether."""


def relative_weights(losses: Tensor, counts: Tensor, settings: ReweightingSettings) -> Tensor:
    """Relative weights of one group, detached, fp32.

    With l the losses, h = (2l − (max + min)) / max(max − min, 1e-6), s the strategy's score and r the temperature::

        u_i = e_i Σ_j c_j / Σ_j c_j e_j,   e_i = exp((s_i − max s) / r)

    Args:
        losses: [M] mean loss of each sequence of the group, finite where its count is positive.
        counts: [M] what each sequence counts in the denominator; sequences with 0 stay out of the loss range.
        settings: strategy and temperature.

    Returns:
        [M]; exactly 1 for ``uniform`` and for an infinite temperature; 0 where the count is 0.
    """
    valid = counts > 0
    if settings.strategy == "uniform" or math.isinf(settings.temperature):
        return valid.float()
    # in float64: where the losses nearly agree, h magnifies what a subtraction in fp32 rounds off
    losses = losses.detach().double()
    highest = torch.where(valid, losses, -torch.inf).amax()
    lowest = torch.where(valid, losses, torch.inf).amin()
    h = (2.0 * losses - (highest + lowest)) / torch.clamp(highest - lowest, min=1e-6)
    scores = torch.where(valid, STRATEGIES[settings.strategy](h), -torch.inf)
    exponentials = torch.exp((scores - scores.amax()) / settings.temperature)
    counts = counts.double()
    # a group without any label has no maximum: 0/0 there must not become the weight of a sample that counts nothing
    normaliser = torch.where(valid, exponentials * counts, 0.0).sum().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(valid, exponentials * (counts.sum() / normaliser), 0.0).float()
