"""The routed experts of a block: small SwiGLU layers whose weights are stacked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.model.initialize import Draw

from .grouped import grouped_linear


class Experts(nn.Module):
    """y = W_down (SiLU(W_gate x) * W_up x) with the weights of each row's expert: [n, d] -> [n, d].

    ``gate`` and ``up`` are [E, f, d], ``down`` [E, d, f]: expert e's matrices, [outputs, inputs] as those of any linear
    layer, are ``gate[e]``, ``up[e]`` and ``down[e]``.

    Args:
        number: E. size: f. hidden_size: d.
        init_std, down_std: of gate and up, and of down.
        first: the number of the first of these experts in its block, where other ranks hold others.
    """

    def __init__(
        self, number: int, size: int, hidden_size: int, init_std: float, down_std: float, first: int = 0
    ) -> None:
        super().__init__()
        self.number, self.first = number, first
        self.shapes = {"gate": (size, hidden_size), "up": (size, hidden_size), "down": (hidden_size, size)}
        self.stds = {"gate": init_std, "up": init_std, "down": down_std}
        self.gate, self.up, self.down = (nn.Parameter(torch.empty(number, *shape)) for shape in self.shapes.values())

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """``x`` [n, d], its rows by expert; ``ends`` [E] int32, where each expert's end; rows after the last give 0."""
        gate, up = grouped_linear(x, self.gate, ends), grouped_linear(x, self.up, ends)
        return grouped_linear(F.silu(gate) * up, self.down, ends)

    def initial_values(self, draw: Draw) -> dict[str, Tensor]:
        """Each expert's matrices are drawn under its number in the block, as ``...experts.3.gate``."""
        values = {name: torch.empty(self.number, *shape) for name, shape in self.shapes.items()}
        for name, whole in values.items():
            for number in range(self.number):
                whole[number] = draw(f"{self.first + number}.{name}", self.shapes[name], self.stds[name])
        return values
