"""Parameter groups: which parameters are decayed, and at which share of the learning rate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .base import OptimizerSettings


def is_norm_or_embedding(name: str) -> bool:
    """Whether ``name`` is a norm's gain or the embedding, by the name of the module that owns it.

    Not by the number of dimensions: under ZeRO-3 every shard is flat.
    """
    owner = name.split(".")[-2]
    return owner == "embedding" or owner.endswith("norm")


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], settings: OptimizerSettings
) -> list[dict[str, Any]]:
    """The decayed parameters, then the others; each group in the order given, empty groups left out.

    Norms and the embedding (and so a tied head, which is the same parameter) are decayed only if asked. Besides what
    torch reads, a group has ``names`` (of its ``params``, in order) and ``lr_scale``, which multiplies the schedule's
    learning rate.
    """
    decayed: list[tuple[str, nn.Parameter]] = []
    plain: list[tuple[str, nn.Parameter]] = []
    for name, parameter in named_parameters:
        exempt = is_norm_or_embedding(name) and not settings.decay_norms_and_embeddings
        (plain if exempt else decayed).append((name, parameter))
    return [
        {
            "params": [parameter for _, parameter in members],
            "names": [name for name, _ in members],
            "weight_decay": weight_decay,
            "lr_scale": 1.0,
        }
        for members, weight_decay in ((decayed, settings.weight_decay), (plain, 0.0))
        if members
    ]
