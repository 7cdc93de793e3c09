"""The initial weights of a run: each module's made by one rank, handed to all, before anything is sharded or trained.

What a module starts as may be dear (the singular values of a large matrix take a minute of one core), so the modules
are dealt out: rank k makes every k-th, all ranks at the same time. Everybody gets the maker's bits, so that no index
and no weight can differ between ranks, even where their libraries round differently.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pretrain.distributed import Distributed
from pretrain.model import initial_values, own_tensors

from .expert_groups import ExpertGroups, is_divided


class Given(Protocol):
    """Values to begin with in place of drawn ones, by the names of parameters and buffers."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of everything that can be read."""

    def read(self, name: str) -> Tensor:
        """One tensor, whole, on the CPU."""


Whole = Callable[[list[nn.Parameter], int], AbstractContextManager[Any]]
"""``whole(parameters, rank)``: inside, the parameters are whole; afterwards all ranks have what ``rank`` wrote."""


@torch.no_grad()
def fill_model(
    model: nn.Module,
    seed: int,
    ranks: Distributed,
    initial: Given | None = None,
    whole: Whole | None = None,
    experts: ExpertGroups | None = None,
    tell_every: float = 10.0,
) -> None:
    """Write the initial value of every parameter and buffer of ``model``, the same on every rank. Collective.

    A rank holds one module's values at a time besides the model.

    Args:
        model: the parameters lie whole on every rank, or ``whole`` makes them so.
        seed: the values are drawn from it and the modules' names.
        initial: values to take in place of the drawn ones, by name; only rank 0 reads from it, and makes all.
        whole: of ZeRO-3.
        experts: the ranks that this one shares experts with, where they are divided.
        tell_every: seconds between two messages of rank 0 about how far it is.
    """
    owned = own_tensors(model)
    if experts is not None:
        for owner in [owner for owner, tensors in owned.items() if any(map(is_divided, tensors.values()))]:
            _fill_divided(model, owner, owned.pop(owner), seed, ranks, initial, experts)
    names, started = list(owned), time.monotonic()
    told = started
    makers = 1 if initial is not None else ranks.world_size
    for first in range(0, len(names), makers):
        turn = names[first : first + makers]
        mine = turn[ranks.rank : ranks.rank + 1]
        values = _values(model, mine[0], owned[mine[0]].keys(), seed, initial) if mine else {}
        for maker, owner in enumerate(turn):
            _hand_over(owned[owner], values, maker, ranks, whole)
        done, now = first + len(turn), time.monotonic()
        if ranks.rank == 0 and now - told >= tell_every:
            left = (now - started) / done * (len(names) - done)
            print(f"initial weights: {done:,} of {len(names):,} modules, about {left:,.0f} s left", flush=True)
            told = now


def _values(model: nn.Module, owner: str, names: Iterable[str], seed: int, initial: Given | None) -> dict[str, Tensor]:
    full = {name: f"{owner}.{name}".removeprefix(".") for name in names}
    given = {own: initial.read(name) for own, name in full.items() if name in initial.shapes} if initial else {}
    # nothing is drawn for a module of which everything is given
    return given if given.keys() == full.keys() else {**initial_values(model, owner, seed), **given}


def _fill_divided(
    model: nn.Module,
    owner: str,
    tensors: dict[str, Tensor],
    seed: int,
    ranks: Distributed,
    initial: Given | None,
    experts: ExpertGroups,
) -> None:
    """Every rank draws its own experts; DeepSpeed hands those of the first to the ranks that have the same ones."""
    given = {name for name in tensors if initial is not None and f"{owner}.{name}" in initial.shapes}
    values = initial_values(model, owner, seed) if given != tensors.keys() else {}
    for name, tensor in tensors.items():
        if name not in given:
            tensor.copy_(values[name])
            continue
        assert initial is not None
        assert isinstance(tensor, nn.Parameter)
        of_all = torch.empty(experts.whole_shape(tensor))
        if ranks.rank == 0:
            of_all.copy_(initial.read(f"{owner}.{name}"))
        tensor.copy_(experts.own(tensor, ranks.broadcast(of_all, 0)))


def _hand_over(
    tensors: dict[str, Tensor], values: dict[str, Tensor], maker: int, ranks: Distributed, whole: Whole | None
) -> None:
    """Write ``values``, which rank ``maker`` has, into ``tensors`` on all ranks."""
    parameters = [tensor for tensor in tensors.values() if isinstance(tensor, nn.Parameter)]
    with whole(parameters, maker) if whole and parameters else nullcontext():
        if ranks.rank == maker:
            for name, tensor in tensors.items():
                tensor.copy_(values[name])
    for tensor in tensors.values():
        if not (whole and isinstance(tensor, nn.Parameter)):
            ranks.broadcast(tensor, maker)
