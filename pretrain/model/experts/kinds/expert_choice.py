"""Expert choice (Zhou et al. 2022, arXiv 2202.09368): experts choose tokens, so that all are equally busy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ..routing import Choice, RoutingSettings, Scores

if TYPE_CHECKING:
    from ..settings import ExpertsSettings


class ExpertChoiceSettings(RoutingSettings):
    """Every expert takes the ⌈k n / E⌉ tokens of a sequence that score highest with it; n are its tokens that count,
    k is ``top_k``, here the mean number of experts a token.

    For research: which experts a token gets depends on the tokens after it, so that a decoder trained this way has seen
    a little of what it is asked for, and routes otherwise when it generates. By sequence, and not by micro-batch as
    published, so that no split of the batch changes anything.
    """

    kind: Literal["expert_choice"] = "expert_choice"
    causal: ClassVar[bool] = False
    takes_bias: ClassVar[bool] = False

    def check(self, settings: ExpertsSettings) -> None:
        if settings.groups is not None or settings.capacity is not None:
            raise ValueError(
                "routing expert_choice has neither groups nor capacity: every expert takes equally many tokens of all; "
                "leave them out"
            )
        if settings.normalised:
            raise ValueError(
                "routing expert_choice weighs by the scores themselves: a token that one expert took would else have "
                "weight 1 whatever its score; set normalised=false"
            )

    def choose(self, scores: Scores, settings: ExpertsSettings, counted: Tensor) -> Choice:
        length, number = scores.scores.shape[1:]
        wanted = (counted.sum(dim=1) * settings.top_k + number - 1) // number
        by_score = scores.scores.detach().masked_fill(~counted[..., None], -math.inf)
        places = by_score.argsort(dim=1, descending=True, stable=True)
        ranks = torch.arange(length, device=places.device)[None, :, None].expand_as(places)
        rank = torch.empty_like(places).scatter_(1, places, ranks)
        # those that don't count rank after all that do, and no more than these are wanted
        kept = rank < wanted[:, None, None]
        experts = torch.arange(number, device=places.device).expand_as(kept)
        return Choice(experts, scores.scores, kept)
