"""Initial weights from (seed, module name) alone.

What a module starts as depends on neither the order in which modules are made, nor on other modules, nor on how many
processes share the model: any rank can make any one module's values by itself. Each module says what its parameters
and buffers start as (``initial_values``); this file keeps the random draws and the walk.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

Draw = Callable[[str, tuple[int, ...], float], Tensor]
"""``draw(name, shape, std)``: normal values in fp32 on the CPU, fixed by ``name`` inside the module that asks."""


@runtime_checkable
class Initializable(Protocol):
    """A module that owns parameters or buffers: everything in this package that does is one."""

    def initial_values(self, draw: Draw) -> dict[str, Tensor]:
        """What the module's own parameters and persistent buffers (names without dots) start as: whole, on the CPU,
        parameters in fp32 and buffers in their own dtype.

        The shapes must come from the module's own sizes: under ZeRO-3 a parameter itself may be an empty shard.
        """


def normal(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """Independent N(0, std²) values in fp32 on the CPU, fixed by ``seed`` and ``name``.

    The generator is numpy's counter-based Philox with a 128-bit key hashed from both: torch's CPU generator keeps only
    32 bits of its seed, so that two of the 10^5 tensors of a large mixture of experts would almost surely be equal.
    """
    key = int.from_bytes(blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")
    values = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values).mul_(std)


def own_tensors(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Every parameter and persistent buffer of ``model``, by the name of the module that owns it and its name there.

    A shared parameter stands at its first owner, as in ``named_parameters``; modules that own nothing are left out.
    """
    kept = model.state_dict(keep_vars=True).keys()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in kept)
    owned: dict[str, dict[str, Tensor]] = {}
    for name, tensor in (*model.named_parameters(), *buffers):
        owner, _, own = name.rpartition(".")
        owned.setdefault(owner, {})[own] = tensor
    return owned


def initial_values(model: nn.Module, owner: str, seed: int) -> dict[str, Tensor]:
    """What the own parameters and buffers of module ``owner`` of ``model`` start as. Reads no tensor's data."""
    module = model.get_submodule(owner)
    if not isinstance(module, Initializable):
        raise TypeError(f"{type(module).__name__} ({owner!r}) has tensors but no initial_values method")

    def draw(name: str, shape: tuple[int, ...], std: float) -> Tensor:
        return normal(f"{owner}.{name}", shape, std, seed)

    return module.initial_values(draw)


@torch.no_grad()
def initialize_(model: nn.Module, seed: int) -> None:
    """Fill every parameter and buffer of a model that lies whole in this process, in place."""
    for owner, tensors in own_tensors(model).items():
        values = initial_values(model, owner, seed)
        for name, tensor in tensors.items():
            tensor.copy_(values[name])
