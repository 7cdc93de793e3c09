"""The optimizer's fp32 weights, given from elsewhere: DeepSpeed makes them from weights that bf16 has rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from pretrain.distributed import Distributed

from .deepspeed_module import import_deepspeed
from .expert_groups import ExpertGroups
from .initial import Given


@torch.no_grad()
def write_masters(
    model: nn.Module,
    given: Given,
    stage: int,
    ranks: Distributed,
    experts: ExpertGroups,
    master: Callable[[nn.Parameter], Tensor],
) -> None:
    """Write every parameter that ``given`` has into the optimizer's fp32 copy, to the last bit. Collective.

    The parameters themselves are these values in bf16 already.

    Args:
        model: what the engine trains.
        given: only rank 0 reads from it, one tensor at a time.
        stage: of ZeRO.
        ranks: this process among its peers.
        experts: those that it shares experts with.
        master: at stage 0, the whole copy of a parameter.
    """
    utils = import_deepspeed().utils
    for name, parameter in model.named_parameters():
        if name not in given.shapes:
            continue
        value = torch.empty(experts.whole_shape(parameter))
        if ranks.rank == 0:
            value.copy_(given.read(name))
        value = experts.own(parameter, ranks.broadcast(value, 0))
        if stage == 0:
            master(parameter).copy_(value)
        elif stage == 3:
            share: int = cast(Any, parameter).partition_numel()  # a method that ZeRO-3 has given it
            utils.safe_set_local_fp32_param(parameter, _part(value, share, ranks.rank))
        else:
            utils.safe_set_full_fp32_param(parameter, value)


def _part(value: Tensor, size: int, rank: int) -> Tensor:
    """What ZeRO-3 keeps of ``value`` on a rank: ``size`` elements, the last rank's filled up."""
    part = torch.zeros(size)
    mine = value.flatten()[rank * size : (rank + 1) * size]
    part[: mine.numel()] = mine
    return part
