"""The one place where a linear layer is made.

Attention, feed-forward and head ask :func:`make_linear` by name and know nothing of how the layer keeps its weight.
"""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from data_pipeline.settings import nearest

from ..mup import initial_std_factor
from .base import LAYER_NAME, LinearSettings, block_shapes, layer_shapes
from .head import Head
from .kinds.dense import DenseSettings

if TYPE_CHECKING:
    from ..settings import ModelSettings

RESIDUAL_WRITERS = ("attention.output", "feed_forward.down", "feed_forward.shared.down", "feed_forward.experts.down")
"""Ends of the names of the linear layers whose output is added to the residual stream: two sums in each block."""

STACKED = ("feed_forward.router", "feed_forward.experts.gate", "feed_forward.experts.up", "feed_forward.experts.down")
"""In a block with experts: what no rule can be for."""


def check_rules(settings: ModelSettings) -> None:
    """Refuse rules that match nothing, or one layer twice, or whose method can't make a layer that they match, or has
    no place in muP.

    Raises:
        ValueError: names the rule, the layer and the reason.
    """
    shapes = layer_shapes(settings)
    matched_by: dict[tuple[int, str], int] = {}
    for number, rule in enumerate(settings.linear):
        where = f"linear.{number} ({rule.kind})"
        if settings.mup and not isinstance(rule, DenseSettings):
            raise ValueError(
                f"{where}: muP's published table scales dense weights by their fan-in; how the parts of a factorised "
                "or sparse layer share that scaling is confirmed nowhere. Leave out model.mup, or this rule"
            )
        first, last = rule.layer_range or (0, settings.layers - 1)
        if last >= settings.layers:
            raise ValueError(
                f"{where}: layers {rule.layers!r} goes beyond the last block; the model has {settings.layers}, from 0 "
                f"to {settings.layers - 1}"
            )
        if not rule.modules:
            raise ValueError(f"{where}: modules is empty, so that the rule is for no layer; leave one of them out")
        for pattern in rule.modules:
            found = [name for name in shapes if fnmatchcase(name, pattern)]
            if not found:
                raise ValueError(f"{where}: modules {pattern!r} matches no layer of a block{nearest(pattern, shapes)}")
            _check_blocks(settings, rule, where, pattern, range(first, last + 1))
        for name in (name for name in shapes if any(fnmatchcase(name, pattern) for pattern in rule.modules)):
            for layer in range(first, last + 1):
                if name not in block_shapes(settings, layer):
                    continue
                other = matched_by.setdefault((layer, name), number)
                if other != number:
                    raise ValueError(
                        f"{where}: blocks.{layer}.{name} is matched by linear.{other} ({settings.linear[other].kind}) "
                        "already; let each layer be matched by one rule"
                    )
            try:
                rule.check(*shapes[name])
            except ValueError as error:
                raise ValueError(f"{where}: {name} [{shapes[name][1]}, {shapes[name][0]}]: {error}") from error


def _check_blocks(settings: ModelSettings, rule: LinearSettings, where: str, pattern: str, layers: range) -> None:
    """Refuse a pattern that says nothing about the blocks it is for, or more than a rule can do there."""
    if not any(fnmatchcase(name, pattern) for layer in layers for name in block_shapes(settings, layer)):
        has = "have experts" if settings.has_experts(layers[0]) else "have none"
        raise ValueError(
            f"{where}: modules {pattern!r} matches no layer of blocks {layers[0]} to {layers[-1]}, which {has}"
        )
    mixed = [layer for layer in layers if settings.has_experts(layer)]
    stacked = [name for name in STACKED if fnmatchcase(name, pattern)]
    if mixed and stacked and not isinstance(rule, DenseSettings):
        raise ValueError(
            f"{where}: modules {pattern!r} matches {stacked[0]} of block {mixed[0]}, whose experts keep dense weights, "
            "stacked for grouped products. Name the layers that are meant, as attention.* or feed_forward.shared.*, or "
            "bound the rule to blocks without experts by `layers`"
        )


def method_of(name: str, settings: ModelSettings) -> LinearSettings:
    """The parameterization of the linear layer ``name``, as ``blocks.0.attention.query`` or ``head``."""
    if found := LAYER_NAME.fullmatch(name):
        layer, inside = int(found[1]), found[2]
        for rule in settings.linear:
            first, last = rule.layer_range or (layer, layer)
            if first <= layer <= last and any(fnmatchcase(inside, pattern) for pattern in rule.modules):
                return rule
    return DenseSettings()


def initial_std(name: str, settings: ModelSettings) -> float:
    """Standard deviation of the initial weight of the linear layer ``name``.

    The layers that write into the residual stream get 1/sqrt(2 L) of the others' (GPT-2, section 2.3), so that the
    variance of the stream after 2 L additions does not grow with the depth. muP multiplies by its own factor.
    """
    scaled = settings.init_scaled_residual and name.endswith(RESIDUAL_WRITERS)
    std = settings.init_std / math.sqrt(2 * settings.layers) if scaled else settings.init_std
    return std * initial_std_factor(name, settings)


def make_linear(in_features: int, out_features: int, name: str, settings: ModelSettings) -> nn.Module:
    """A linear layer without bias, [..., in_features] -> [..., out_features].

    Args:
        name: the module's full name in the decoder, for example ``blocks.0.attention.query``: what ``model.linear``
            chooses by.
    """
    if name == "head":
        return Head(in_features, out_features, initial_std(name, settings))
    return method_of(name, settings).make(in_features, out_features, initial_std(name, settings))
