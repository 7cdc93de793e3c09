"""Whether what an optimizer holds is finite: an update can overflow although loss and gradient were finite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .shards import Shard

LARGEST = torch.finfo(torch.bfloat16).max
"""Of a weight that is still finite when it is rounded to bf16."""


@torch.no_grad()
def non_finite_parts(shards: Sequence[Shard], optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the parameters of which an element of the fp32 weights, or of the state that goes with it, is not finite
    on this rank; of a state that is of another shape than the weights, all parameters of the tensor. Reads every
    element once, without a copy.
    """
    held = [(shard, tensor) for shard in shards for tensor in _tensors(shard, optimizer)]
    if not held:
        return []
    # a reduction without a temporary tensor; it hands a NaN on
    sizes = [torch.linalg.vector_norm(tensor, torch.inf) for _, tensor in held]
    found: set[str] = set()
    for (shard, tensor), size in zip(held, [float(size) for size in sizes], strict=True):
        if not size <= LARGEST:
            found |= set(_names(shard, tensor))
    return sorted(found)


def _tensors(shard: Shard, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    yield shard.tensor.detach()
    waiting = list(optimizer.state.get(shard.tensor, {}).values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):  # what is kept of whole matrices
            waiting += value.values()
        elif isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            yield value


def _names(shard: Shard, tensor: Tensor) -> Iterator[str]:
    flat = tensor.reshape(-1)
    for part in shard.parts:
        own = flat[part.offset : part.offset + part.length] if flat.numel() == shard.tensor.numel() else flat
        if not bool((own.abs() <= LARGEST).all()):
            yield part.name
