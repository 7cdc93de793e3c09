"""Initial weights from (seed, module name) alone.

What a module starts as depends on neither the order in which modules are made, nor on other modules, nor on how many
processes share the model: any rank can make any one module's values by itself. Each module says what its parameters
and buffers start as (``initial_values``); this file keeps the random draws and the walk.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn


class Draw:
    """The random draws of one module: each fixed by the seed, the module's name and its own name inside the module."""

    def __init__(self, module: str, seed: int) -> None:
        self._module = module
        self._seed = seed

    def __call__(self, name: str, shape: tuple[int, ...], std: float) -> Tensor:
        """Independent N(0, std²) values in fp32 on the CPU."""
        return normal(f"{self._module}.{name}", shape, std, self._seed)

    def generator(self, name: str) -> np.random.Generator:
        """For other draws than normal ones."""
        return _generator(f"{self._module}.{name}", self._seed)


@runtime_checkable
class Initializable(Protocol):
    """A module that owns parameters or buffers: everything in this package that does is one."""

    def initial_values(self, draw: Draw) -> dict[str, Tensor]:
        """What the module's own parameters and persistent buffers (names without dots) start as: whole, on the CPU,
        parameters in fp32 and buffers in their own dtype.

        The shapes must come from the module's own sizes: under ZeRO-3 a parameter itself may be an empty shard.
        """


def normal(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """Independent N(0, std²) values in fp32 on the CPU, fixed by ``seed`` and ``name``."""
    return torch.from_numpy(_generator(name, seed).standard_normal(shape, dtype=np.float32)).mul_(std)


def _generator(name: str, seed: int) -> np.random.Generator:
    """Random numbers fixed by ``seed`` and ``name``.

    The generator is numpy's counter-based Philox with a 128-bit key hashed from both: torch's CPU generator keeps only
    32 bits of its seed, so that two of the 10^5 tensors of a large mixture of experts would almost surely be equal.
    """
    key = int.from_bytes(blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


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
    return module.initial_values(Draw(owner, seed))


@torch.no_grad()
def initialize_(model: nn.Module, seed: int) -> None:
    """Fill every parameter and buffer of a model that lies whole in this process, in place."""
    for owner, tensors in own_tensors(model).items():
        values = initial_values(model, owner, seed)
        for name, tensor in tensors.items():
            tensor.copy_(values[name])
