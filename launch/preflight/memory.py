"""Memory of one GPU, and of the host for what is saved beside the training, by arithmetic, before there is one.

With P parameters on R ranks, s bytes for a value (2 in bf16, 4 in fp32) and B elements of a bucket::

    weights        P s                      ZeRO 3: P s / R, and what DeepSpeed keeps gathered, up to 10^9 of them
    gradients      P s (ZeRO 0, 1)          and their sums: 4 P (ZeRO 1 in bf16), 4 P / R (ZeRO 2), 8 P / R (ZeRO 3)
    optimizer      its fp32 state and copy of the weights: all at ZeRO 0, else a share of 1 / R
    context        what CUDA, its libraries and NCCL hold: 1.5 GB

Where experts are divided among ranks, P is a rank's own, except in shares P / R, which are of all parameters. The rest
is at the same time the larger of what a backward pass takes and what follows the last one::

    activations    :func:`pretrain.costs.memory`, and buckets of 2 B s (ZeRO 1), 3 B s (ZeRO 2, 3)
    reduction      ZeRO 0: a flat copy of up to 5 10^8 gradients, in bf16 an fp32 copy of all; ZeRO 1: 4 P / R, and
                   2 B s, in bf16 6 bytes for each of up to 5 10^8 gradients

The allocator's gaps and short-lived tensors are the error bar (``benchmarks/memory_estimate.py``).

An asynchronous save copies what a rank writes of a checkpoint to the host and keeps the room: rank 0 the weights (but
at ZeRO 3), and each rank its share of the optimizer's state; at ZeRO 0, where all have the same, rank 0 alone. With
experts divided among ranks DeepSpeed writes otherwise at ZeRO 0: rank 0 all that it has twice, the others their
optimizer's state and their experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from pretrain.config import Config
from pretrain.costs import memory, parameters_of_a_rank
from pretrain.model import parameter_shapes

from .findings import Finding, Request, size

CONTEXT_BYTES = 1.5e9
ERROR_BAR = 0.25
"""The estimate may be off by this part of it."""
_BUCKET = 50_000_000
_REDUCED_TOGETHER, _LIVE = 500_000_000, 1_000_000_000
"""DeepSpeed's own bounds: elements reduced in one flat copy, and of parameters that ZeRO 3 leaves gathered."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank's device."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """With the buckets that a backward pass fills."""
    buffers: float
    reduction: float
    """What is taken when the activations are gone."""

    @property
    def tensors(self) -> float:
        """All but what the device's libraries take for themselves."""
        lasting = self.weights + self.gradients + self.optimizer + self.buffers
        return lasting + max(self.activations, self.reduction)


def estimate(config: Config, vocab_size: int, ranks: int) -> MemoryEstimate:
    """What one of ``ranks`` ranks holds at its peak."""
    shapes = parameter_shapes(config.model, vocab_size)
    total, value = sum(math.prod(shape) for shape in shapes.values()), 2 if config.training.precision == "bf16" else 4
    count = parameters_of_a_rank(config, shapes)
    stage, bf16 = config.engine.zero_stage, value == 2
    costs = memory(config, vocab_size, ranks)
    bucket = float(min((config.engine.bucket_elements or _BUCKET) if stage else 0, count) * value)
    weights, gradients, buckets = float(count * value), float(count * value), 2 * bucket
    if stage == 0:
        flat_copy = float(min(count, _REDUCED_TOGETHER) * value) if ranks > 1 else 0.0
        reduction = max(flat_copy, 4.0 * count if bf16 else 0.0)
    elif stage == 1 and bf16:
        gradients += 4.0 * count
        reduction = 6.0 * min(count, _REDUCED_TOGETHER) if ranks > 1 else 0.0
    elif stage == 1:
        reduction = 4.0 * total / ranks + buckets
    else:
        gradients = (4.0 if stage == 2 else 8.0) * total / ranks
        buckets, reduction = 3 * bucket, 0.0
    if stage == 3:
        weights = (total / ranks + min(total, _LIVE)) * value
    optimizer = float(costs["optimizer_state_of_a_rank"])
    if config.engine.offload_optimizer == "cpu":
        optimizer, gradients = 0.0, gradients - (4.0 * total / ranks if stage >= 2 else 0.0)
    how = config.training.activation_checkpointing
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=float(costs["activations"][how]["micro_batch"]) + buckets,
        buffers=float(costs["buffers"]),
        reduction=reduction,
    )


def host_copies(config: Config, vocab_size: int, ranks: int) -> tuple[float, float]:
    """Bytes of the copy that an asynchronous save holds: of rank 0, and of each other rank."""
    stage, divided = config.engine.zero_stage, config.engine.expert_parallel
    value = 2 if config.training.precision == "bf16" else 4
    state = float(memory(config, vocab_size, ranks)["optimizer_state_of_a_rank"])
    shapes = parameter_shapes(config.model, vocab_size)
    weights = float(value * parameters_of_a_rank(config, shapes))
    if stage == 3:
        return state, state
    if stage:
        return state + weights, state
    if divided == 1:
        return state + weights, 0.0
    experts = value * sum(math.prod(shape) for name, shape in shapes.items() if ".experts." in name) / divided
    return 2 * (state + weights), state + experts


def check_memory(config: Config, vocab_size: int, request: Request) -> Iterator[Finding]:
    """The estimate for the fewest ranks, where it is largest, against the GPU's memory."""
    ranks = request.worlds[0]
    if config.checkpoint.asynchronous:
        first, other = host_copies(config, vocab_size, ranks)
        node = size(first + (request.ranks_per_node - 1) * other)
        cause = f"Saves beside the training hold a copy of {size(first)} of rank 0, {size(other)} of each other rank"
        yield Finding("memory.host", "info", f"{cause}, in the host's memory: {node} on the first node.")
    found = estimate(config, vocab_size, ranks)
    context = CONTEXT_BYTES if request.gpus else 0.0
    total = found.tensors + context
    parts = ", ".join(
        f"{name} {size(getattr(found, name))}" for name in ("weights", "gradients", "optimizer", "activations")
    )
    told = (
        f"About {size(total)} (±{ERROR_BAR:.0%}) for each of {ranks} ranks: {parts}, buffers {size(found.buffers)}"
        f"{f', CUDA {size(context)}' if context else ''}; instead of activations, later {size(found.reduction)}."
    )
    given = request.gpu_memory
    if given is None:
        yield Finding("memory", "info", told, "Give --gpu-memory to have it compared." if request.gpus else "")
        return
    mend = (
        "Lower training.micro_batch, set training.activation_checkpointing=full, raise engine.zero_stage, or take more "
        "GPUs."
    )
    if total * (1 - ERROR_BAR) > given:
        yield Finding("memory.exceeded", "error", f"{told} A GPU has {size(given)}.", mend)
    elif total * (1 + ERROR_BAR) > given:
        yield Finding("memory.tight", "warning", f"{told} A GPU has {size(given)}: it may not fit.", mend)
    else:
        yield Finding("memory", "info", f"{told} A GPU has {size(given)}.")
