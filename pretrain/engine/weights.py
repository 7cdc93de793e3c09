"""Whole weights out of a checkpoint, on one process, by what it says of itself (:mod:`.layout`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .by_name import Copy, copies_of, stored_parts
from .deepspeed_module import choose_accelerator
from .layout import Layout, Part, read_layout, resolve


class StoredTensor(Protocol):
    """A tensor of a checkpoint that may still lie there in pieces."""

    def contiguous(self) -> Tensor:
        """The tensor, whole, on the CPU."""


class _Files:
    """The files of a checkpoint, each mapped into memory when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: dict[str, Any] = {}

    def __getitem__(self, file: str) -> Any:
        if file not in self._opened:
            path = self._folder / file
            choose_accelerator()
            self._opened[file] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        return self._opened[file]


class _Pieces:
    """A parameter in fp32, put together out of the optimizer's tensors."""

    def __init__(self, files: _Files, shape: Sequence[int], copies: Sequence[Copy]) -> None:
        self._files, self._shape, self._copies = files, shape, copies

    def contiguous(self) -> Tensor:
        whole = torch.empty(self._shape)
        for copy in self._copies:
            weights = resolve(self._files[copy.place.file], copy.place.weights).detach().reshape(-1)
            whole.view(-1)[copy.target : copy.target + copy.length] = weights[copy.source : copy.source + copy.length]
        return whole


class _Stored(Mapping[str, StoredTensor]):
    def __init__(self, folder: Path) -> None:
        self._layout: Layout = read_layout(folder)
        self._files = _Files(folder)
        self._parts = stored_parts(self._layout)

    @cached_property
    def _buffers(self) -> dict[str, Tensor]:
        content = self._files[self._layout.model]
        return {name: content["module"][name] for name in content["buffer_names"]}

    def __getitem__(self, name: str) -> StoredTensor:
        if name not in self._layout.shapes:
            return self._buffers[name]
        shape = torch.Size(self._layout.shapes[name])
        copies = copies_of(Part(name, 0, shape.numel(), 0), 0, self._parts[name])
        return _Pieces(self._files, shape, list(copies))

    def __iter__(self) -> Iterator[str]:
        return iter((*self._layout.shapes, *self._buffers))

    def __len__(self) -> int:
        return len(self._layout.shapes) + len(self._buffers)


def stored_weights(checkpoint: Path) -> Mapping[str, StoredTensor]:
    """Every parameter and buffer of a checkpoint by name, whatever topology saved it; a tied head is not named.

    Parameters are the optimizer's own copy, in fp32. They stay in the files, mapped into memory, until asked for.

    Args:
        checkpoint: a complete checkpoint folder.

    Raises:
        DataError: its record of what lies where can't be read.
    """
    return _Stored(checkpoint)


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """All of :func:`stored_weights` at once, whole; floating-point values in fp32."""
    whole = {name: stored.contiguous() for name, stored in stored_weights(checkpoint).items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in whole.items()}
