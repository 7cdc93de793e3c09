"""What comes back to the embedding: a fingerprint of a rank's own backward passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class GradientWatch:
    """Sums up the squares of the gradient of a module's output over the micro-steps of a step, on the device.

    It has passed through every block of this rank, and nothing of another rank is in it yet.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.energy = torch.zeros((), dtype=torch.float64, device=device)
        module.register_forward_hook(self._watch)

    def begin(self) -> None:
        """A step begins."""
        self.energy = torch.zeros_like(self.energy)

    def _watch(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._add)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def _add(self, gradient: Tensor) -> None:
        self.energy = self.energy + gradient.float().square().sum()
