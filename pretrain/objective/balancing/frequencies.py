"""Which share of the slots each expert has, over the tokens of the whole optimizer step or what stands for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pretrain.distributed import Distributed

from .kinds.load_balance import LoadBalanceSettings

Saved = Mapping[str, Sequence[Sequence[float]]]
"""Loss to its f [L][E] for the next step: part of the run's state, to the bit."""


def shares(counts: Tensor) -> Tensor:
    """Counts [..., E] over their sum; 0 where nothing was counted."""
    return counts / counts.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(counts.dtype).tiny)


class StepFrequencies:
    """f of the losses of one optimizer step.

    Args:
        losses: those of the step at the level ``global_batch``.
        micro_steps: of the step.
        ranks: this process among its peers.
        saved: what the step before left; empty at the beginning of a run.
    """

    def __init__(
        self, losses: Sequence[LoadBalanceSettings], micro_steps: int, ranks: Distributed, saved: Saved
    ) -> None:
        self._losses, self._ranks, self._saved = losses, ranks, saved
        self._micro_steps = micro_steps
        ways = {loss.way for loss in losses}
        self._exact, self._buffered = "exact" in ways, "buffer" in ways
        self._scored: list[Tensor] = []
        self._whole: Tensor | None = None
        """Choices of the whole step over all ranks, [L, E], once they are known."""
        self._so_far: Tensor | None = None

    @property
    def scores_first(self) -> bool:
        """Whether every micro-step has to be given to :meth:`score` before the first backward pass."""
        return self._exact and self._micro_steps > 1

    def score(self, choices: Tensor) -> None:
        """This rank's choices of a micro-step, [L, E] float64, from a pass without gradients."""
        self._scored.append(choices)

    def begin_micro_step(self, choices: Tensor) -> None:
        """This rank's choices of the micro-step whose losses come next, [L, E] float64. Collective where f is exact (in
        the first micro-step) or buffered."""
        if self._exact and self._whole is None:
            assert self._micro_steps == 1 or len(self._scored) == self._micro_steps, "every micro-step is scored first"
            own = torch.stack(self._scored).sum(dim=0) if self._scored else choices.clone()
            self._whole = self._ranks.all_reduce(own)
        if self._buffered:
            known = self._exact and self._micro_steps == 1
            now = self._whole if known and self._whole is not None else self._ranks.all_reduce(choices.clone())
            self._so_far = now if self._so_far is None else self._so_far + now

    def of(self, loss: LoadBalanceSettings, like: Tensor) -> Tensor:
        """f of a loss, [L, E] in the dtype and on the device of ``like`` [L, ..., E]."""
        match loss.way:
            case "exact":
                counts = self._whole
            case "buffer":
                counts = self._so_far
            case _:
                found = self._saved.get(loss.label)
                if found is None:  # uniform: the gradient of Σ_i P_i, which is constant, is none
                    return like.new_full((len(like), like.shape[-1]), 1.0 / like.shape[-1])
                return torch.tensor(found, dtype=torch.float64, device=like.device).to(like.dtype)
        assert counts is not None
        return shares(counts).to(like.dtype)

    def save(self, choices: Tensor) -> dict[str, list[list[float]]]:
        """What the next step needs, from the choices of the whole step over all ranks [L, E] float64, on the host."""
        if not choices.any():  # a step of holes says nothing
            return {label: [list(row) for row in found] for label, found in self._saved.items()}
        now, saved = shares(choices), {}
        for loss in self._losses:
            if loss.way == "previous_step":
                saved[loss.label] = now.tolist()
            elif loss.way == "running":
                before = self._saved.get(loss.label)
                mean = (
                    now
                    if before is None
                    else torch.tensor(before, dtype=torch.float64).lerp(now, 1.0 - loss.effective_decay)
                )
                saved[loss.label] = mean.tolist()
        return saved
