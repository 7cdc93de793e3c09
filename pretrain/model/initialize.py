"""Initial weights from (seed, parameter name) alone.

A parameter's initial value depends on neither the order in which modules are made, nor on other parameters, nor on how
many processes share the model: any rank can make any one parameter by itself. Each module says what its parameters
start as (``initial_value``); this file keeps the random draws and the walk.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

Draw = Callable[[str, tuple[int, ...], float], Tensor]
"""``draw(parameter, shape, std)``: normal values for a parameter, by its name inside the module that asks."""


@runtime_checkable
class Initializable(Protocol):
    """A module that owns parameters: everything in this package that does is one."""

    def initial_value(self, parameter: str, draw: Draw) -> Tensor:
        """What the module's own ``parameter`` (a name without dots) starts as: whole, fp32, on the CPU.

        The shape must come from the module's own sizes: under ZeRO-3 the parameter itself may be an empty shard.
        """


def normal(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """Independent N(0, std²) values in fp32 on the CPU, fixed by ``seed`` and ``name``.

    The generator is numpy's counter-based Philox with a 128-bit key hashed from both: torch's CPU generator keeps only
    32 bits of its seed, so that two of the 10^5 tensors of a large mixture of experts would almost surely be equal.
    """
    key = int.from_bytes(blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")
    values = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values).mul_(std)


def initial_value(model: nn.Module, name: str, seed: int) -> Tensor:
    """What parameter ``name`` of ``model`` starts as: whole, fp32, on the CPU. Reads no parameter's data."""
    owner_name, _, parameter = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if not isinstance(owner, Initializable):
        raise TypeError(f"{type(owner).__name__} ({owner_name!r}) has parameters but no initial_value method")

    def draw(parameter: str, shape: tuple[int, ...], std: float) -> Tensor:
        return normal(f"{owner_name}.{parameter}", shape, std, seed)

    return owner.initial_value(parameter, draw)


@torch.no_grad()
def fill(model: nn.Module, name: str, tensor: Tensor, seed: int) -> None:
    """Write the initial value of parameter ``name`` of ``model`` into ``tensor`` (whole; any dtype and device)."""
    tensor.copy_(initial_value(model, name, seed))


def initialize_(model: nn.Module, seed: int) -> None:
    """Fill every parameter of a model that lies whole in this process, in place."""
    for name, parameter in model.named_parameters():
        fill(model, name, parameter, seed)
