"""A mixture of experts in the place of a block's feed-forward layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pretrain.distributed import Distributed

from ..feed_forward import FeedForward
from ..linear.choose import initial_std
from .capacity import within_capacity
from .dispatch import Dispatch
from .entropy import tsallis_entropy
from .exchange import Exchange
from .experts import Experts
from .kinds.top_k import TopKSettings, top_experts
from .router import Router
from .routing import Choice, Scores
from .statistics import Routing

if TYPE_CHECKING:
    from ..settings import ModelSettings


class MixtureOfExperts(nn.Module):
    """y = scaling Σ_k w_k expert_{e_k}(x) + shared(x), with e and w of the router: [b, T, d] -> [b, T, d].

    Args:
        name: the module's full name, as ``blocks.3.feed_forward``.
        layer: the block's number.
        settings: of the model, with ``experts``.
        across: the ranks that hold the experts together, an equal part each, in their order; None: all are here.
    """

    def __init__(self, name: str, layer: int, settings: ModelSettings, across: Distributed | None = None) -> None:
        super().__init__()
        mixture = settings.experts
        assert mixture is not None
        self.settings = mixture
        hidden, size = settings.hidden_size, mixture.intermediate_size
        stds = [initial_std(f"{name}.{part}", settings) for part in ("router", "experts.gate", "experts.down")]
        self.router = Router(layer, mixture, hidden, stds[0])
        self.across = across if across is not None and across.world_size > 1 else None
        here = mixture.number if self.across is None else mixture.number // self.across.world_size
        first = 0 if self.across is None else here * self.across.rank
        self.experts = Experts(here, size, hidden, stds[1], stds[2], first)
        if mixture.shared:
            self.shared = FeedForward(f"{name}.shared", settings, mixture.shared * size)

    def forward(
        self, x: Tensor, counted: Tensor | None, noise_keys: Tensor | None, of_step: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The layer's output, and ``Routing.packed`` [b, routing_width(E)] of the tokens that count.

        Args:
            x: [b, T, d].
            counted: [b, T] bool, the tokens that the sums count, and that no other token takes a place from; None: all.
            noise_keys: [b] int64 of the jitter; None: none.
            of_step: the pass is one of an optimizer step, in which the capacity holds.
        """
        mixture = self.settings
        # before the experts, so that the backward pass comes to it after them: what first asks for a recomputed value
        # must not lie in a module with weights, from which ZeRO-3 would take them away at the end of its recomputation
        shared = self.shared(x) if mixture.shared else None
        scores = self.router.scores(self.router(x, noise_keys))
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if counted is None else counted
        choice = mixture.routing.choose(scores, mixture, valid)
        kept = choice
        if mixture.capacity is not None and of_step:
            kept = within_capacity(choice, mixture.capacity, mixture.number, valid)
        plan = Dispatch.plan(
            kept.experts.flatten(0, 1), None if kept.kept is None else kept.kept.flatten(0, 1), mixture.number
        )
        sorted_outputs = self._outputs(plan.gather(x.flatten(0, 1)), plan.ends)
        output = plan.combine(sorted_outputs, self._weights(choice, kept).flatten(0, 1)).view_as(x)
        output = output if shared is None else output + shared
        return output, self._statistics(scores, choice, kept, valid).packed

    def _outputs(self, rows: Tensor, ends: Tensor) -> Tensor:
        """What the experts make of the rows [n, d] in their order; ``ends`` [E] as of a :class:`Dispatch`."""
        if self.across is None:
            outputs: Tensor = self.experts(rows, ends)
        else:
            exchange = Exchange.plan(ends, self.across)
            outputs = exchange.back(self.experts(exchange.there(rows), exchange.ends), len(rows))
        return outputs

    def _weights(self, choice: Choice, kept: Choice) -> Tensor:
        """[b, T, K]; those of a token's chosen experts sum to ``scaling`` where they are normalised, dropped or not."""
        weights = choice.weights if choice.kept is None else choice.weights.masked_fill(~choice.kept, 0.0)
        if self.settings.normalised:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        weights = weights * self.settings.scaling if self.settings.scaling != 1.0 else weights
        return weights if kept.kept is None else weights.masked_fill(~kept.kept, 0.0)

    def _statistics(self, scores: Scores, choice: Choice, kept: Choice, counted: Tensor) -> Routing:
        mixture, mask = self.settings, counted.float()

        def summed(values: Tensor) -> Tensor:
            """Over the tokens that count: [b, T] -> [b]."""
            return (values * mask).sum(dim=1)

        number = mixture.number
        loads = choice.counts(number, counted)
        choices = loads
        if mixture.selection_bias or not isinstance(mixture.routing, TopKSettings):
            choices = Choice(top_experts(scores.scores.detach(), mixture), choice.weights).counts(number, counted)
        by_expert = torch.bmm(mask[:, None, :], scores.probabilities).squeeze(1)
        log_partition = torch.logsumexp(scores.logits, dim=-1)
        entropy = None if mixture.entropy is None else tsallis_entropy(scores.probabilities, mixture.entropy)
        shannon = torch.special.entr(scores.probabilities.detach()).sum(dim=-1)
        scalars = (
            mask.sum(dim=1),
            summed(log_partition.square()),
            torch.zeros_like(mask[:, 0]) if entropy is None else summed(entropy),
            summed(shannon),
            torch.zeros_like(mask[:, 0]) if kept is choice else (loads - kept.counts(number, counted)).sum(dim=1),
        )
        return Routing.pack((choices, loads, by_expert), scalars)
