"""Which part of which matrix lies where in the flat tensors that DeepSpeed hands an optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.errors import HeadraceError
from pretrain.distributed import Distributed
from pretrain.optimizer import MatrixWise
from pretrain.optimizer.matrices import Piece, pieces_of

Unit = tuple[list[Tensor], list[Piece]]
"""Tensors that DeepSpeed lets the optimizer step together, and the pieces of matrices in them."""


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """The whole shape, also where ZeRO-3 has split the parameter over the ranks."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def attach_matrices(
    optimizer: torch.optim.Optimizer, wrapper: Any, model: nn.Module, stage: int, ranks: Distributed
) -> None:
    """Tell an optimizer that updates whole matrices where the pieces of them lie, as DeepSpeed has laid them out.

    Collective. Every piece is held against the weights that it is a copy of, so that a layout which this file does not
    know is an error and not a wrong update.

    Args:
        optimizer: the one that DeepSpeed was given; its groups are marked ``matrix`` where it updates whole matrices.
        wrapper: the one that ``deepspeed.initialize`` returned.
        model: what the engine trains, not trained since.

    Raises:
        HeadraceError: the tensors don't hold what DeepSpeed 0.19.8 puts there, or the optimizer can't be told.
    """
    groups = optimizer.param_groups
    if not any(group["matrix"] for group in groups):
        return
    if not isinstance(optimizer, MatrixWise):
        raise HeadraceError(
            f"{type(optimizer).__name__} is to update whole matrices, and is no pretrain.optimizer.MatrixWise: under "
            "ZeRO it would get flat parts of them. Derive it from that class."
        )
    optimizer.attach(_units(wrapper, groups, model, stage, ranks), ranks)


def _units(
    wrapper: Any, groups: Sequence[dict[str, Any]], model: nn.Module, stage: int, ranks: Distributed
) -> list[Unit]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    units: list[Unit] = []
    for number, group in enumerate(groups):
        if not group["matrix"]:
            continue
        if stage == 0:
            units.append(_whole(group))
        elif stage == 3:
            units += [_split(wrapper, each, names, ranks) for each in _sub_groups(wrapper, number)]
        else:
            units.append(_flattened(wrapper, number, names, ranks))
    return units


def _whole(group: dict[str, Any]) -> Unit:
    """Stage 0: a tensor is a matrix, or a stack of matrices."""
    tensors = list(group["params"])
    pieces = [
        piece
        for number, (name, tensor) in enumerate(zip(group["names"], tensors, strict=True))
        for piece in pieces_of(name, tensor.shape, tensor=number)
    ]
    return tensors, pieces


def _flattened(wrapper: Any, number: int, names: dict[int, str], ranks: Distributed) -> Unit:
    """Stages 1 and 2: the parameters of a group one after another, cut into as many equal parts as there are ranks."""
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
    pieces = []
    for parameter, offset in zip(parameters, offsets, strict=True):
        first, last = max(offset, begin), min(offset + parameter.numel(), begin + held.numel())
        if first < last:
            pieces += _pieces(
                names,
                parameter,
                first - offset,
                first - begin,
                held,
                parameter.detach().reshape(-1)[first - offset : last - offset],
            )
    return [held], pieces


def _sub_groups(wrapper: Any, number: int) -> Iterator[int]:
    return (sub_group for sub_group, group in wrapper.sub_group_to_group_id.items() if group == number)


def _split(wrapper: Any, sub_group: int, names: dict[int, str], ranks: Distributed) -> Unit:
    """Stage 3: of every parameter a part, as long on every rank, the last filled up."""
    held = wrapper.fp32_partitioned_groups_flat[sub_group]
    pieces, offset = [], 0
    for parameter in wrapper.fp16_groups[sub_group]:
        share = parameter.partition_numel()
        start = ranks.rank * share
        length = min(share, parameter.ds_numel - start)
        if length > 0:
            pieces += _pieces(names, parameter, start, offset, held, parameter.ds_tensor.detach().reshape(-1)[:length])
        offset += share
    return [held], pieces


def _pieces(
    names: dict[int, str], parameter: nn.Parameter, start: int, offset: int, held: Tensor, weights: Tensor
) -> list[Piece]:
    """What ``held`` has, from ``offset`` on, of a parameter from ``start`` on, checked to be its ``weights`` there."""
    pieces = pieces_of(names[id(parameter)], shape_of(parameter), start, len(weights), offset=offset)
    for piece in pieces:
        first = piece.offset - offset
        _same(piece, held, weights[first : first + piece.length])
    return pieces


def _same(piece: Piece, held: Tensor, weights: Tensor) -> None:
    mine = piece.read(held.detach())
    # a run that resumes has not drawn its weights: they are whatever the memory held, NaN too
    if len(mine) != len(weights) or not torch.allclose(
        mine, weights.to(held.device, held.dtype), rtol=0.0, atol=0.0, equal_nan=True
    ):
        raise HeadraceError(
            f"the optimizer does not hold elements {piece.start} to {piece.start + piece.length} of {piece.name} where "
            "DeepSpeed 0.19.8 puts them, so that a matrix can't be put together. Use the tested version of DeepSpeed "
            "and leave out what engine.deepspeed changes in the layout, or take optimizer.kind adamw."
        )
