"""Which part of which parameter lies where in the flat tensors that DeepSpeed 0.19.8 hands an optimizer.

=====  ===================================================================================================
stage  a tensor
=====  ===================================================================================================
0      one parameter, whole on every rank
1, 2   the parameters of a group one after another, cut into as many equal parts as there are ranks; a group of
       experts that are divided among ranks, into as many as there are ranks with the same ones
3      of every parameter of a part of a group a share, as long on every rank; the last rank's is filled up
=====  ===================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.errors import HeadraceError
from pretrain.distributed import Distributed
from pretrain.optimizer import MatrixWise
from pretrain.optimizer.matrices import Piece, pieces_of

from .expert_groups import ExpertGroups
from .layout import Key, Part


@dataclass(frozen=True)
class Shard:
    """A tensor that the optimizer steps, fp32, on this rank."""

    tensor: Tensor
    group: int
    """Number of its parameter group."""
    weights: tuple[Key, ...]
    """What leads to it from the part of a checkpoint's file that holds this rank's optimizer."""
    parts: tuple[Part, ...]


def shards_of(
    wrapper: Any,
    groups: Sequence[dict[str, Any]],
    model: nn.Module,
    stage: int,
    ranks: Distributed,
    experts: ExpertGroups,
) -> list[Shard]:
    """Everything that this rank's optimizer steps, in the optimizer's order.

    Every part is held against the weights that it is a copy of, so that a layout which this file does not know is an
    error and not a wrong update or a wrong checkpoint.

    Args:
        wrapper: the optimizer that ``deepspeed.initialize`` returned.
        groups: of the optimizer that DeepSpeed was given.
        model: what the engine trains, not trained since.
        stage: of ZeRO.
        ranks: this process among its peers.
        experts: those that it shares experts with.

    Raises:
        HeadraceError: the tensors don't hold what DeepSpeed 0.19.8 puts there.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    shards: list[Shard] = []
    for number, group in enumerate(groups):
        if stage == 0:
            shards += _whole(wrapper, number, group)
        elif stage == 3:
            shards += [_split(wrapper, number, each, names, ranks) for each in _sub_groups(wrapper, number)]
        else:
            shards.append(_flattened(wrapper, number, names, experts.alike if group.get("moe") else ranks))
    before = {names[id(parameter)]: experts.before(parameter) for parameter in model.parameters()}
    return [
        replace(shard, parts=tuple(replace(part, start=before[part.name] + part.start) for part in shard.parts))
        for shard in shards
    ]


def _whole(wrapper: Any, number: int, group: dict[str, Any]) -> Iterator[Shard]:
    has_masters = hasattr(wrapper, "fp32_groups")
    for place, (name, tensor) in enumerate(zip(group["names"], group["params"], strict=True)):
        keys: tuple[Key, ...] = ("optimizer", "fp32_groups", number, place) if has_masters else ("module", name)
        yield Shard(tensor, number, keys, (Part(name, 0, tensor.numel(), 0),))


def _flattened(wrapper: Any, number: int, names: dict[int, str], ranks: Distributed) -> Shard:
    if hasattr(wrapper, "bf16_groups"):  # stage 1 in bf16
        parameters, held = wrapper.bf16_groups[number], wrapper.fp32_groups_flat_partition[number]
        offsets, position = [], 0
        for parameter in parameters:
            offsets.append(position)
            position += parameter.numel()
    else:
        parameters, held = wrapper.round_robin_bit16_groups[number], wrapper.single_partition_of_fp32_groups[number]
        offsets = wrapper.round_robin_bit16_offsets[number]
    begin = ranks.rank * held.numel()
    parts = []
    for parameter, offset in zip(parameters, offsets, strict=True):
        first, last = max(offset, begin), min(offset + parameter.numel(), begin + held.numel())
        if first < last:
            part = Part(names[id(parameter)], first - offset, last - first, first - begin)
            _same(part, held, parameter.detach().reshape(-1)[part.start : part.start + part.length])
            parts.append(part)
    return Shard(held, number, ("optimizer_state_dict", "single_partition_of_fp32_groups", number), tuple(parts))


def _sub_groups(wrapper: Any, number: int) -> Iterator[int]:
    return (sub_group for sub_group, group in wrapper.sub_group_to_group_id.items() if group == number)


def _split(wrapper: Any, number: int, sub_group: int, names: dict[int, str], ranks: Distributed) -> Shard:
    held = wrapper.fp32_partitioned_groups_flat[sub_group]
    parts, offset = [], 0
    for parameter in wrapper.fp16_groups[sub_group]:
        share = parameter.partition_numel()
        start = ranks.rank * share
        length = min(share, parameter.ds_numel - start)
        if length > 0:
            part = Part(names[id(parameter)], start, length, offset)
            _same(part, held, parameter.ds_tensor.detach().reshape(-1)[:length])
            parts.append(part)
        offset += share
    return Shard(held, number, ("optimizer_state_dict", "fp32_flat_groups", sub_group), tuple(parts))


def _same(part: Part, held: Tensor, weights: Tensor) -> None:
    mine = held.detach()[part.offset : part.offset + part.length]
    # a run that resumes has not drawn its weights: they are whatever the memory held, NaN too
    if len(mine) != len(weights) or not torch.allclose(
        mine, weights.to(held.device, held.dtype), rtol=0.0, atol=0.0, equal_nan=True
    ):
        raise HeadraceError(
            f"the optimizer does not hold elements {part.start} to {part.start + part.length} of {part.name} where "
            "DeepSpeed 0.19.8 puts them, so that neither a matrix can be put together nor a checkpoint be read on "
            "another topology. Use the tested version of DeepSpeed and leave out what engine.deepspeed changes in the "
            "layout."
        )


def attach_matrices(
    optimizer: torch.optim.Optimizer,
    shards: Sequence[Shard],
    shapes: Mapping[str, tuple[int, ...]],
    stage: int,
    ranks: Distributed,
    experts: ExpertGroups,
) -> None:
    """Tell an optimizer that updates whole matrices where the pieces of them lie. Collective.

    Args:
        optimizer: the one that DeepSpeed was given; its groups are marked ``matrix`` where it updates whole matrices.
        shards: of :func:`shards_of`.
        shapes: of all parameters.
        stage: of ZeRO.
        ranks: this process among its peers.
        experts: those that it shares experts with.

    Raises:
        HeadraceError: the optimizer can't be told.
    """
    groups = optimizer.param_groups
    if not any(group["matrix"] for group in groups):
        return
    if not isinstance(optimizer, MatrixWise):
        raise HeadraceError(
            f"{type(optimizer).__name__} is to update whole matrices, and is no pretrain.optimizer.MatrixWise: under "
            "ZeRO it would get flat parts of them. Derive it from that class."
        )
    together: dict[int, list[Shard]] = {}
    for number, shard in enumerate(shards):
        if groups[shard.group]["matrix"]:
            # what DeepSpeed lets the optimizer step at a time: a group, at stage 3 one of its tensors
            together.setdefault(number if stage == 3 else shard.group, []).append(shard)
    optimizer.attach(
        [
            (
                [shard.tensor for shard in unit],
                _pieces(unit, shapes),
                experts.alike if groups[unit[0].group].get("moe") else ranks,
            )
            for unit in together.values()
        ]
    )


def _pieces(unit: Sequence[Shard], shapes: Mapping[str, tuple[int, ...]]) -> list[Piece]:
    return [
        piece
        for number, shard in enumerate(unit)
        for part in shard.parts
        for piece in pieces_of(part.name, shapes[part.name], part.start, part.length, number, part.offset)
    ]
