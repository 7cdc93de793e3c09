"""Between the norm of a gradient, which DeepSpeed 0.19.8 finds in the middle of its step, and the update by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class UpdateGate:
    """Lets an optimizer's updates through only where that is decided, once an engine's step, at the first of them.

    DeepSpeed calls the optimizer once or several times in a step (stages 1 and 2: for each group, stage 3: for each
    part of one), always after it has found and reduced the norm of the whole gradient. Without the calls all else of
    its step stays as it is: gradients are used up, weights are made anew from the optimizer's unchanged ones.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._step = optimizer.step
        self._decide: Callable[[], bool] = lambda: True
        self._decision: bool | None = None
        self.passed = True
        """Whether the last step's update was made, or would have been but for DeepSpeed."""
        # of this object alone: DeepSpeed calls it in the middle of its own step
        optimizer.step = self._gated  # type: ignore[method-assign, assignment]

    @contextmanager
    def deciding(self, decide: Callable[[], bool]) -> Iterator[None]:
        """An engine's step is made in here. ``decide`` is asked once, also where DeepSpeed itself leaves the update
        out because the gradient is not finite, which it looks at in some stages and precisions only."""
        self._decide, self._decision = decide, None
        new = not self._optimizer.state
        yield
        self.passed = self._allowed()
        if not self.passed and new:
            self._optimizer.state.clear()  # DeepSpeed has looked for what a first update would have left there

    def _allowed(self) -> bool:
        if self._decision is None:
            self._decision = self._decide()
        return self._decision

    def _gated(self) -> None:
        if self._allowed():
            self._step()
