"""Activation checkpointing: what a block keeps for the backward pass, the rest being computed again.

``full`` keeps each block's input. ``low_rank`` keeps besides it the products of the first of two factors, r values of a
token for each factorised layer, so that the recomputation leaves these products out: CoLA-M (Liu et al. 2025, arXiv
2502.10940), which recomputes all but the r-dimensional activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

ActivationCheckpointing = Literal["none", "full", "low_rank"]


def run_block(block: nn.Module, how: ActivationCheckpointing, *inputs: Any) -> Any:
    """``block(*inputs)``, to be recomputed in the backward pass as ``how`` says. Nothing in a block may be random."""
    if how == "none":
        return block(*inputs)
    # without gradients, the same
    contexts = _keep_products if how == "low_rank" else noop_context_fn
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts, preserve_rng_state=False)


def first_product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ by the first of two factors: x [..., n], W [r, n] -> [..., r]. What ``low_rank`` keeps."""
    if (product := _product.get()) is None:
        return F.linear(x, weight)
    made: Tensor = _FirstProduct.apply(x, weight, product)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return made


_product: ContextVar[Callable[[Tensor, Tensor], Tensor] | None] = ContextVar("first product", default=None)
"""Inside a block under ``low_rank``: makes a product and keeps it, or gives back the one that was kept."""


def _keep_products() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a block's forward pass and of its recomputation.

    torch's own selective policy looks at every operation from Python and finds the kept ones by counting; the layers
    know which products they are, and come in the same order.
    """
    kept: list[Tensor] = []

    @contextmanager
    def keeping() -> Iterator[None]:
        def make(x: Tensor, weight: Tensor) -> Tensor:
            kept.append(x.matmul(weight.t()))
            return kept[-1].detach()  # the other becomes part of the graph, which would then keep itself alive

        with _using(make):
            yield

    @contextmanager
    def giving_back() -> Iterator[None]:
        products = iter(kept)
        with _using(lambda x, weight: next(products).detach()):
            yield

    return keeping(), giving_back()


@contextmanager
def _using(product: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    token = _product.set(product)
    try:
        yield
    finally:
        _product.reset(token)


class _FirstProduct(torch.autograd.Function):
    """x Wᵀ whose value may be known already; the gradients are those of ``F.linear``, to the bit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        return gradient.matmul(weight), gradient.flatten(0, -2).t().mm(x.flatten(0, -2)), None
