"""The entropy loss of DynMoLE (arXiv 2504.00661): makes routers decided."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from pretrain.model.experts.statistics import Routing

from ..base import RouterLossSettings


class EntropyLossSettings(RouterLossSettings):
    """The mean Tsallis entropy of the routers' distributions, as ``model.experts.entropy`` has it; 1e-2 in the paper
    (at second hand) and its code. It has a gradient for experts that were not chosen too, as is meant."""

    kind: Literal["entropy"] = "entropy"
    needs_entropy: ClassVar[bool] = True

    def rows(self, routing: Routing, frequencies: Tensor | None) -> Tensor:
        return routing.entropy
