"""The weights that a model computes with, made anew from the optimizer's fp32 weights, as DeepSpeed 0.19.8 does."""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def write_low_precision(wrapper: Any, stage: int) -> None:
    """Give the model's parameters the values of the optimizer's own, rounded where they are bf16. Collective.

    Args:
        wrapper: the optimizer that ``deepspeed.initialize`` returned.
        stage: of ZeRO.
    """
    if stage == 3:
        _write_split(wrapper)
    elif stage:
        wrapper.update_lp_params()
    elif hasattr(wrapper, "fp32_groups"):  # stage 0 in bf16; in fp32 the optimizer's weights are the model's
        for low, high in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            torch._foreach_copy_(low, high)


def _write_split(wrapper: Any) -> None:
    """Stage 3: this rank's share of every parameter; the whole ones that it keeps of small parameters come after."""
    wrapper.checkpoint_event_prologue()
    flat = zip(wrapper.fp32_partitioned_groups_flat, wrapper.fp16_partitioned_groups_flat, strict=True)
    for number, (high, low) in enumerate(flat):
        low.copy_(high)
        shares = wrapper.fp16_partitioned_groups[number]
        for share, values in zip(shares, wrapper.unflatten(low, shares), strict=True):
            share.data = values.data
    wrapper.checkpoint_event_epilogue()
