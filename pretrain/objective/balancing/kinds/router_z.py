"""The router z-loss (ST-MoE, arXiv 2202.08906): keeps the logits of a router small."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from pretrain.model.experts.statistics import Routing

from ..base import RouterLossSettings


class RouterZSettings(RouterLossSettings):
    """The mean of (log Σ_i exp x_i)² over the tokens, x a router's logits; the paper's coefficient is 1e-3."""

    kind: Literal["router_z"] = "router_z"

    def rows(self, routing: Routing, frequencies: Tensor | None) -> Tensor:
        return routing.squared_log_partition
