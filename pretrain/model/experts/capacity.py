"""A bound on the slots of an expert in a sequence, and who is dropped beyond it."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from .routing import Choice
from .settings import CapacitySettings


def capacity(settings: CapacitySettings, top_k: int, length: int, experts: int) -> int:
    """⌈factor k T / E⌉, of the decimal number that the factor is written as."""
    return math.ceil(Fraction(str(settings.factor)) * top_k * length / experts)


def within_capacity(choice: Choice, settings: CapacitySettings, experts: int, counted: Tensor) -> Choice:
    """The choice without the slots for which an expert has no room in a sequence.

    By sequence and not by micro-batch, so that no split of the batch changes anything. Tokens that don't count take no
    room and keep their slots. With ``priority: position`` a token's slots hang on the tokens before it alone.

    Args:
        choice: of a fixed number of slots a token, all filled.
        counted: [b, T] bool.
    """
    batch, length, slots = choice.experts.shape
    room = capacity(settings, slots, length, experts)
    chosen = choice.experts.flatten(1)
    takes = counted[..., None].expand_as(choice.experts).flatten(1)
    if settings.priority == "score":
        # of equal weights the earlier first
        first = choice.weights.detach().flatten(1).argsort(dim=1, descending=True, stable=True)
    else:
        first = torch.arange(length * slots, device=chosen.device).expand(batch, -1)
    # a number for each (slot in the order of priority, expert) would be [b, T k, E]: sorted by expert, it is a running
    # count that begins anew with each expert
    keys = torch.where(takes, chosen, experts).gather(1, first)
    by_expert, order = keys.sort(dim=1, stable=True)
    begins = torch.searchsorted(
        by_expert, torch.arange(experts + 1, device=chosen.device).expand(batch, -1).contiguous()
    )
    rank = torch.arange(length * slots, device=chosen.device) - begins.gather(1, by_expert)
    stays = (rank < room) | (by_expert == experts)
    kept = torch.empty_like(stays).scatter_(1, first.gather(1, order), stays)
    return choice._replace(kept=kept.view_as(choice.experts))
