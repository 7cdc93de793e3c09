"""The usual way: every token goes to the experts of its k largest scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..routing import Choice, RoutingSettings, Scores

if TYPE_CHECKING:
    from ..settings import ExpertsSettings, GroupSettings


def allowed_by_groups(selection: Tensor, groups: GroupSettings) -> Tensor:
    """Which experts a token may go to: those of the ``kept`` best of its groups of neighbours. [..., E] bool.

    Args:
        selection: [..., E], what experts are chosen by.
    """
    by_group = selection.view(*selection.shape[:-1], groups.number, -1)
    best = by_group.topk(min(groups.best, by_group.shape[-1]), dim=-1).values.sum(dim=-1)
    chosen = best.topk(groups.kept, dim=-1).indices
    allowed = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, chosen, True)
    return allowed.repeat_interleave(by_group.shape[-1], dim=-1)


def top_experts(selection: Tensor, settings: ExpertsSettings) -> Tensor:
    """The experts of the ``top_k`` largest of ``selection`` [..., E], within the groups: [..., k] int64."""
    if settings.groups is not None:
        selection = selection.masked_fill(~allowed_by_groups(selection, settings.groups), float("-inf"))
    return selection.topk(settings.top_k, dim=-1).indices


class TopKSettings(RoutingSettings):
    """``top_k`` experts for every token, by score and selection bias."""

    kind: Literal["top_k"] = "top_k"

    def choose(self, scores: Scores, settings: ExpertsSettings, counted: Tensor) -> Choice:
        experts = top_experts(scores.scores.detach() + scores.bias, settings)
        return Choice(experts, scores.scores.gather(-1, experts))
