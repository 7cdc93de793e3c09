"""Optimizers that treat a weight as a matrix, right under any sharding of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import HeadraceError
from pretrain.distributed import Distributed

from .base import AdamSettings
from .matrices import MatrixUnit, Piece, pieces_of

Group = dict[str, Any]

MATRICES = "matrices"
"""Key of what is kept for whole matrices, by their names, in the state of a tensor."""


class MatrixWise(torch.optim.Optimizer):
    """Base: AdamW for the groups that are not marked ``matrix``, a subclass's rule for the matrices of the others.

    A tensor of a marked group is a matrix itself, or holds pieces of matrices that :meth:`attach` has told: a flat
    tensor whose pieces are unknown is refused, as its update would be wrong without a sign.

    A subclass says how the elementwise state advances (:meth:`begin`), which values a matrix consists of (:meth:`read`)
    and what the update of whole matrices is (:meth:`updates`). Weight decay is decoupled: a weight loses the share
    ``lr * weight_decay`` before the update is applied.

    Args:
        groups: of :func:`~pretrain.optimizer.groups.parameter_groups`.
        settings: of the learning rate, and of AdamW for the groups that are not marked.
    """

    dtype = torch.float32
    """Of matrices and their updates on the way between ranks."""
    spread = True
    """Where every rank holds all matrices, each computes a share of the updates for all."""
    keeps_matrices = False
    """Whether the state of a matrix is one of the whole matrix (:meth:`matrix_state`), and not sharded like it."""

    def __init__(self, groups: list[Group], settings: AdamSettings) -> None:
        others = [group for group in groups if not group["matrix"]]
        self._adamw = settings.adamw(others) if others else None
        super().__init__(groups, {"lr": settings.lr})
        self._units: dict[Tensor, MatrixUnit] = {}

    def attach(self, units: Sequence[tuple[Sequence[Tensor], Sequence[Piece], Distributed]]) -> None:
        """Tell where the pieces of the matrices lie. Collective.

        Args:
            units: for each set of tensors that are stepped together, in one order on all ranks: the tensors, what lies
                in them, and this process among those that hold pieces of the same matrices.
        """
        made = [MatrixUnit(tensors, pieces, ranks, self.dtype, self.spread) for tensors, pieces, ranks in units]
        self._units = {unit.tensors[0]: unit for unit in made}

    def homes(self) -> dict[str, Tensor]:
        """For each matrix that this rank keeps state of as a whole, the tensor with whose state."""
        found = {name: home for unit in self._units.values() for name, home in unit.homes.items()}
        return found if self.keeps_matrices else {}

    def matrix_state(self, home: Tensor, name: str) -> dict[str, Any]:
        """What is kept of a whole matrix, to be read and changed; it is saved, and follows the matrix to its owner."""
        state: dict[str, Any] = self.state[home].setdefault(MATRICES, {}).setdefault(name, {})
        return state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nothing calls an optimizer with a closure
        """Update the parameters of ``param_groups`` (of one of them, when ZeRO says so). Collective."""
        for group in self.param_groups:
            if not group["params"]:
                continue
            if group["matrix"]:
                self._step_matrices(group)
            else:
                assert self._adamw is not None
                self._adamw.state, self._adamw.param_groups = self.state, [group]
                self._adamw.step()

    def _step_matrices(self, group: Group) -> None:
        unit = self._unit(group)
        for tensor in unit.tensors:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
            self.begin(group, tensor)
            tensor.mul_(1.0 - group["lr"] * group["weight_decay"])
        for now in unit.rounds:
            matrices = unit.gather(
                now, lambda piece: self.read(group, unit.tensors[piece.tensor], piece).to(unit.device, unit.dtype)
            )
            for piece, values in unit.scatter(now, self.updates(group, matrices, unit.homes_in(now))):
                piece.add(unit.tensors[piece.tensor], values, -group["lr"] * self.factor(piece.shape))

    def _unit(self, group: Group) -> MatrixUnit:
        tensors = group["params"]
        unit = self._units.get(tensors[0])
        if unit is None and all(tensor.dim() in (2, 3) for tensor in tensors):
            pieces = [
                piece
                for number, (name, tensor) in enumerate(zip(group["names"], tensors, strict=True))
                for piece in pieces_of(name, tensor.shape, tensor=number)
            ]
            unit = MatrixUnit(tensors, pieces, Distributed(0, 1, tensors[0].device), self.dtype)
            self._units[tensors[0]] = unit
        if unit is None or [*map(id, unit.tensors)] != [*map(id, tensors)]:
            raise HeadraceError(
                f"{type(self).__name__} got tensors of shapes {[list(tensor.shape) for tensor in tensors]} for the "
                f"matrices {', '.join(group['names'][:3])}, ... and was not told which part of which matrix they hold: "
                "its update would be wrong. pretrain.engine.shards has no map of this kind of engine."
            )
        return unit

    def begin(self, group: Group, tensor: Tensor) -> None:
        """Advance the state that goes element by element with ``tensor`` and its gradient."""

    def read(self, group: Group, tensor: Tensor, piece: Piece) -> Tensor:
        """The values [length] of a piece that lies in ``tensor``: what the matrix in :meth:`updates` is made of."""
        assert tensor.grad is not None
        return piece.read(tensor.grad)

    def updates(self, group: Group, matrices: dict[str, Tensor], homes: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is subtracted from each matrix [m, n], by name, before the learning rate and :meth:`factor`.

        Args:
            homes: for each matrix, a tensor in which it lies, to keep its state with.
        """
        raise NotImplementedError

    def factor(self, shape: tuple[int, int]) -> float:
        """What multiplies the update of a matrix of this shape."""
        return 1.0
