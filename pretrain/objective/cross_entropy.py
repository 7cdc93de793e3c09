"""Cross-entropy by token and by sequence, and the log-partition that the z-loss needs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_cross_entropy(logits: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
    """−log p(label) of every token, in fp32.

    Args:
        logits: [b, T, V], any floating dtype.
        labels: [b, T] int64; where the mask is off any valid index.
        loss_mask: [b, T] bool.

    Returns:
        [b, T] fp32, nats; 0 where the mask is off.
    """
    batch, length, vocabulary = logits.shape
    targets = labels.masked_fill(~loss_mask, -100).view(-1)
    losses = F.cross_entropy(logits.float().view(-1, vocabulary), targets, reduction="none", ignore_index=-100)
    return losses.view(batch, length)


def sequence_cross_entropy(logits: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
    """Sum over each sequence's labels of −log p(label), [b] fp32, nats; arguments as :func:`token_cross_entropy`'s."""
    return token_cross_entropy(logits, labels, loss_mask).sum(dim=1)


def sequence_squared_log_partition(logits: Tensor, loss_mask: Tensor) -> Tensor:
    """Sum over each sequence's labelled tokens of (log Σ_v exp z_v)², in fp32 (PaLM, arXiv 2204.02311, section 5).

    Args:
        logits: [b, T, V]; loss_mask: [b, T] bool.

    Returns:
        [b] fp32.
    """
    log_partition = torch.logsumexp(logits.float(), dim=-1)
    # not a product: where nothing counts, logits that are not finite must not either
    return log_partition.masked_fill(~loss_mask, 0.0).square().sum(dim=1)


def only_gradient_of(output: Tensor, counted: Tensor) -> None:
    """Make the gradient of logits exactly zero where no loss counts, even where the logits are not finite.

    A weight of 0 does not: the derivative of a loss that is not finite is not finite either, and 0 times it is NaN.

    Args:
        output: [b, T, V], or what else of each token the loss takes, before the backward pass.
        counted: [b, T] bool.
    """
    if output.requires_grad:

        def zero(gradient: Tensor) -> None:
            # in place, for it may be larger than the model; it comes from the losses above, and nobody else holds it
            gradient.masked_fill_(~counted[:, :, None], 0.0)

        output.register_hook(zero)  # type: ignore[no-untyped-call]  # torch leaves it untyped
