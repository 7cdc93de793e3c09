"""Products of rows with one matrix each, the rows of a matrix lying together: what dropless experts are made of.

On GPUs that have it, torch's grouped product does all groups in one kernel and the host never knows their sizes.
Elsewhere a loop over the groups writes each product into its place: on a CPU the sizes are known for nothing, and a
product of some hundred rows is as fast in a loop as in one kernel.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.eager import eager


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """y_i = W_e x_i for the rows i of group e: x [n, a], W [E, m, a] -> [n, m].

    Args:
        ends: [E] int32, ascending: group e is the rows from ``ends[e - 1]`` (0 for the first) to ``ends[e]``. Rows
            after the last belong to no group: they give 0 and get a gradient of 0.
    """
    made: Tensor = _GroupedLinear.apply(x, weight, ends)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return made


class _GroupedLinear(torch.autograd.Function):
    """One function and not the views of a loop: the gradient of W is written once into one tensor, and ZeRO-3 may take
    the gathered weight away between the passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return _products(x, weight.mT, ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        of_x = _products(gradient, weight, ends) if ctx.needs_input_grad[0] else None
        of_weight = _outer_products(gradient, x, ends) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None


def _has_kernel(x: Tensor, *sizes: int) -> bool:
    """Whether torch's grouped product takes bf16 operands like ``x`` of matrices with these sides: on CUDA from compute
    capability 8.0 on, with rows of whole 16 bytes."""
    fits = x.is_cuda and x.dtype == torch.bfloat16 and all(size % 8 == 0 for size in sizes)
    return fits and torch.cuda.get_device_capability(x.device) >= (8, 0)


def _products(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """x [n, a] by the matrices [E, a, m] of their groups: [n, m]."""
    if _has_kernel(x, *matrices.shape[1:]):
        made: Tensor = F.grouped_mm(x, matrices, offs=ends)
        rest = torch.arange(len(x), device=x.device) >= ends[-1]
        return made.masked_fill_(rest[:, None], 0.0)  # the kernel leaves them as the memory was
    looped: Tensor = _looped_products(x, matrices, ends)
    return looped


def _outer_products(gradient: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Σ_i gradient_i x_iᵀ of each group, gradient [n, m] and x [n, a]: [E, m, a]."""
    if _has_kernel(x, gradient.shape[-1], x.shape[-1]):
        made: Tensor = F.grouped_mm(gradient.mT, x, offs=ends)
    else:
        made = _looped_outer_products(gradient, x, ends)
    return made


@eager
def _looped_products(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    made = x.new_empty(len(x), matrices.shape[-1])
    bounds = [0, *ends.tolist()]
    for matrix, (first, last) in zip(matrices, pairwise(bounds), strict=True):
        if first < last:
            torch.mm(x[first:last], matrix, out=made[first:last])
    made[bounds[-1] :].zero_()
    return made


@eager
def _looped_outer_products(gradient: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    made = x.new_empty(len(ends), gradient.shape[-1], x.shape[-1])
    for place, (first, last) in zip(made, pairwise([0, *ends.tolist()]), strict=True):
        if first < last:
            torch.mm(gradient[first:last].mT, x[first:last], out=place)
        else:
            place.zero_()
    return made
