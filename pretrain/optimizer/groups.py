"""Parameter groups: which parameters are decayed, and at which share of the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from pretrain.model.mup import WidthScaling

from .base import OptimizerSettings


def is_norm_or_embedding(name: str) -> bool:
    """Whether ``name`` is a norm's gain or the embedding, by the name of the module that owns it.

    Not by the number of dimensions: under ZeRO-3 every shard is flat.
    """
    owner = name.split(".")[-2]
    return owner == "embedding" or owner.endswith("norm")


def is_router(name: str) -> bool:
    """Whether ``name`` is the weight of a mixture of experts' router."""
    return name.split(".")[-2] == "router"


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    settings: OptimizerSettings,
    scaling: Callable[[str], WidthScaling] = lambda name: WidthScaling(),
    shape_of: Callable[[nn.Parameter], Sequence[int]] = lambda parameter: parameter.shape,
) -> list[dict[str, Any]]:
    """One group for the parameters of equal scaling: those decayed, then the others; the highest learning rate first.

    A group's parameters are in the order given. Norms and the embedding (and so a tied head, which is the same
    parameter) are decayed only if asked. Besides what torch reads, a group has ``names`` (of its ``params``, in order)
    and ``lr_scale``, which multiplies the schedule's learning rate, ``gradient_scale``, by which the entries of the
    gradients are larger than in the standard parametrisation, and ``matrix``: the optimizer updates its parameters as
    whole matrices. Which group a parameter is in does not depend on ``weight_decay``, so that a resumed run may change
    it.

    Args:
        scaling: the factors of a parameter, by name (``model.mup``); without it all are 1.
        shape_of: the whole shape of a parameter that is sharded.
    """
    members: dict[tuple[bool, WidthScaling, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named_parameters:
        exempt = is_norm_or_embedding(name) and not settings.decay_norms_and_embeddings
        key = (exempt, scaling(name), settings.is_matrix(name, shape_of(parameter)))
        members.setdefault(key, []).append((name, parameter))
    return [
        {
            "params": [parameter for _, parameter in members[exempt, factors, matrix]],
            "names": [name for name, _ in members[exempt, factors, matrix]],
            "weight_decay": 0.0 if exempt else settings.weight_decay * factors.weight_decay,
            "lr_scale": factors.learning_rate,
            "gradient_scale": factors.gradient,
            "matrix": matrix,
        }
        for exempt, factors, matrix in sorted(members, key=lambda key: (key[0], -key[1].learning_rate, key[2]))
    ]
