"""Weights and optimizer state out of a checkpoint of any topology: by name, and only the elements that a rank needs.

A rank maps the files of the checkpoint into memory one after another and copies the slices that its own tensors hold,
so that it never has more than its share of the model, however it was saved. What goes element by element with a tensor
(moments) is copied like the weights; what stands for all its elements (a count of steps) has to be the same wherever it
comes from; what an optimizer keeps for a whole matrix goes to the rank that updates that matrix now.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import HeadraceError
from pretrain.optimizer.matrix_wise import MATRICES

from .layout import Layout, Part, Place, resolve
from .shards import Shard


@dataclass(frozen=True)
class Copy:
    """Elements on their way from a file to one of this rank's tensors."""

    place: Place
    source: int
    """First element in the tensor of ``place``."""
    shard: int
    """Number of this rank's tensor."""
    target: int
    """First element in that tensor."""
    length: int


def plan_copies(layout: Layout, shards: Sequence[Shard]) -> list[Copy]:
    """From where every element of this rank's tensors is to come.

    Raises:
        HeadraceError: some element of a parameter is in no file.
    """
    stored = stored_parts(layout)
    return [
        copy
        for number, shard in enumerate(shards)
        for part in shard.parts
        for copy in copies_of(part, number, stored.get(part.name, []))
    ]


def stored_parts(layout: Layout) -> dict[str, list[tuple[Part, Place]]]:
    """For each parameter its parts, by their first elements, and where each lies."""
    stored: dict[str, list[tuple[Part, Place]]] = {}
    for place in layout.places:
        for part in place.parts:
            stored.setdefault(part.name, []).append((part, place))
    for parts in stored.values():
        parts.sort(key=lambda found: found[0].start)
    return stored


def copies_of(part: Part, shard: int, stored: Iterable[tuple[Part, Place]]) -> Iterable[Copy]:
    """What makes up ``part`` of this rank's tensor ``shard``, out of what is stored of the same parameter.

    Raises:
        HeadraceError: some element of it is in no file.
    """
    at, end = part.start, part.start + part.length
    for source, place in stored:
        stop = min(end, source.start + source.length)
        if source.start <= at < stop:
            yield Copy(place, source.offset + at - source.start, shard, part.offset + at - part.start, stop - at)
            at = stop
    if at < end:
        raise HeadraceError(f"elements {at} to {end} of {part.name} are not in the checkpoint")


@torch.no_grad()
def load_by_name(
    folder: Path,
    layout: Layout,
    shards: Sequence[Shard],
    optimizer: torch.optim.Optimizer,
    homes: Mapping[str, Tensor],
) -> int:
    """Write weights and optimizer state of a checkpoint into this rank's tensors. Communicates with nobody.

    Args:
        folder: of the checkpoint.
        layout: what it says of itself.
        shards: all tensors that ``optimizer`` steps on this rank.
        homes: for each matrix that this rank keeps state of as a whole, the tensor with whose state.

    Returns:
        bytes copied.

    Raises:
        HeadraceError: the checkpoint holds something else than ``layout`` says, or state that can't be laid out here.
    """
    by_file: dict[str, list[Copy]] = {}
    for copy in plan_copies(layout, shards):
        by_file.setdefault(copy.place.file, []).append(copy)
    kept = {name: place for place in layout.places for name in place.matrices if name in homes}
    if missing := homes.keys() - kept.keys():
        raise HeadraceError(f"{folder}: no state of the matrices {', '.join(sorted(missing)[:3])} was saved")
    states = _States(optimizer, shards)
    copied = 0
    for file in sorted({*by_file, *(place.file for place in kept.values())}):
        # mapped, not read: what is not asked for stays on the disk
        content = torch.load(folder / file, map_location="cpu", mmap=True, weights_only=False)
        for copy in by_file.get(file, []):
            weights = resolve(content, copy.place.weights)
            copied += _copy(weights, copy, shards[copy.shard].tensor)
            copied += states.take(copy, resolve(content, copy.place.state))
        for name, place in kept.items():
            if place.file == file:
                copied += states.take_matrix(homes[name], name, resolve(content, place.state))
    states.finish(homes)
    return copied


def _copy(source: Tensor, copy: Copy, target: Tensor) -> int:
    if source.dtype != target.dtype:
        raise HeadraceError(f"{copy.place.file} holds {source.dtype} where this run has {target.dtype}")
    values = source.reshape(-1)[copy.source : copy.source + copy.length]
    target.view(-1)[copy.target : copy.target + copy.length].copy_(values)
    return values.numel() * values.element_size()


class _States:
    """The optimizer's state of this rank's tensors, put together piece by piece.

    Saved again it has the bytes that it would have had without: matrices stand in the optimizer's order, and equal keys
    are one object, of which a pickle writes the second as a reference.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, shards: Sequence[Shard]) -> None:
        self._optimizer = optimizer
        self._shards = shards
        self._made: list[dict[str, Any]] = [{} for _ in shards]
        self._filled: list[Counter[str]] = [Counter() for _ in shards]
        """Elements written, of each state that goes element by element."""
        self._matrices: dict[str, dict[str, Any]] = {}

    def take(self, copy: Copy, saved: Mapping[str, Any]) -> int:
        """The part of a saved state that goes with ``copy``; returns bytes copied."""
        made, tensor, copied = self._made[copy.shard], self._shards[copy.shard].tensor, 0
        for key, value in _interned(saved).items():
            if key == MATRICES:
                continue
            if isinstance(value, Tensor) and value.dim():
                if value.numel() != copy.place.elements:
                    raise HeadraceError(
                        f"{copy.place.file}: {value.numel()} elements of {key} for a tensor of {copy.place.elements}"
                    )
                if key not in made:
                    made[key] = torch.zeros_like(tensor, dtype=value.dtype)
                copied += _copy(value, copy, made[key])
                self._filled[copy.shard][key] += copy.length
            else:
                self._take_common(copy, key, value)
        return copied

    def _take_common(self, copy: Copy, key: str, value: Any) -> None:
        """What stands for all elements of a tensor."""
        made, shard = self._made[copy.shard], self._shards[copy.shard]
        if key not in made:
            # each tensor's own: torch counts steps in place
            made[key] = value.to(self._device_of_counts(shard), copy=True) if isinstance(value, Tensor) else value
        elif made[key] != value:
            names = ", ".join(sorted({part.name for part in shard.parts})[:3])
            raise HeadraceError(
                f"the optimizer's state {key!r} of {names}, ... was saved as {float(made[key])} for some elements and "
                f"as {float(value)} for others, and on this topology they can have only one. Resume on the topology "
                "that saved."
            )
        self._filled[copy.shard][key] += copy.length

    def _device_of_counts(self, shard: Shard) -> torch.device:
        """By torch's own rule (``Optimizer.load_state_dict``): fused kernels want the count beside the weights."""
        group = self._optimizer.param_groups[shard.group]
        is_beside = group.get("fused") or group.get("capturable")
        return shard.tensor.device if is_beside else torch.device("cpu")

    def take_matrix(self, home: Tensor, name: str, saved: Mapping[str, Any]) -> int:
        """What was kept of a whole matrix, to be kept with the state of ``home``; returns bytes copied."""
        state = saved.get(MATRICES, {}).get(name)
        if state is None:  # not stepped yet
            return 0
        own = self._matrices[name] = {
            key: value.to(home.device, copy=True) if isinstance(value, Tensor) else value
            for key, value in _interned(state).items()
        }
        return sum(value.numel() * value.element_size() for value in own.values() if isinstance(value, Tensor))

    def finish(self, homes: Mapping[str, Tensor]) -> None:
        """Hand everything to the optimizer.

        Raises:
            HeadraceError: a state is there for some elements only.
        """
        for shard, made, filled in zip(self._shards, self._made, self._filled, strict=True):
            elements = sum(part.length for part in shard.parts)
            for key, count in filled.items():
                if count != elements:
                    names = ", ".join(sorted({part.name for part in shard.parts})[:3])
                    raise HeadraceError(
                        f"the optimizer's state {key!r} of {names}, ... was saved for {count} of {elements} elements"
                    )
            self._optimizer.state[shard.tensor] = made
        for name, home in homes.items():
            if name in self._matrices:
                self._optimizer.state[home].setdefault(MATRICES, {})[name] = self._matrices[name]


def _interned(saved: Mapping[str, Any]) -> dict[str, Any]:
    """With keys that are one object where they are equal, as those in a program's text are."""
    return {sys.intern(key): value for key, value in saved.items()}
