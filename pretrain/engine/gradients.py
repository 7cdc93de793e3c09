"""Where DeepSpeed 0.19.8 keeps the reduced gradients of an optimizer step, between the last backward and the step.

==================  ==============  ==================================================================================
ZeRO stage          precision       the gradients that clipping and the update will read
==================  ==============  ==================================================================================
0                   fp32, bf16      ``grad`` of the parameters, reduced over the ranks, in the precision of training
1                   bf16            ``fp32_groups_gradients_flat`` of its bf16 optimizer: whole on every rank, fp32; the
                                    partitions and the views by parameter are parts of them
1 (fp32), 2         fp32, bf16      ``averaged_gradients``: for each group the pieces of this rank's partition, fp32
3                   fp32, bf16      ``averaged_gradients``: for each group this rank's piece of each parameter, fp32
any, offloaded      fp32, bf16      in host memory, but the norms that clipping reads were taken in the backward pass
==================  ==============  ==================================================================================
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scale_gradients(engine: Any, factor: Tensor) -> None:
    """Multiply the reduced gradients by ``factor`` (scalar, on the device), in place.

    After the last backward pass of a step and before its clipping. bf16 gradients (stage 0) are rounded once more.
    The optimizer must not be offloaded.
    """
    gradients, factor = _reduced(engine), factor.float()
    if precise := [gradient for gradient in gradients if gradient.dtype == torch.float32]:
        torch._foreach_mul_(precise, factor)
    for gradient in gradients:
        if gradient.dtype != torch.float32:
            # not in place: a factor rounded to bf16 would be wrong by up to 0.4 %, for all of them alike
            gradient.copy_(gradient.float() * factor)


def forget_gradients(engine: Any) -> None:
    """Drop the gradients of a step whose update was left out. DeepSpeed does so itself, but for stages 1 and 2 with an
    offloaded optimizer: there it keeps them, not finite, and would add the next step's to them."""
    optimizer = engine.optimizer
    if getattr(optimizer, "cpu_offload", False):  # stage 3 names it otherwise, and has no such fault
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None


def _reduced(engine: Any) -> list[Tensor]:
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_groups_gradients_flat"):
        return list(optimizer.fp32_groups_gradients_flat)
    if hasattr(optimizer, "averaged_gradients"):
        groups = optimizer.averaged_gradients.values()
        return [piece for pieces in groups if pieces is not None for piece in pieces]
    return [p.grad for p in engine.module.parameters() if p.grad is not None]
