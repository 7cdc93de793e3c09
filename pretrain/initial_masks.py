"""Masks that a run begins with, decided by the weights of other runs (``mask_from`` of pruned linear layers).

Only rank 0 reads the other runs' checkpoints; the others get the masks from it when the engine fills them in. They are
buffers and so part of every checkpoint of the run: a resumed run never comes here.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from data_pipeline.errors import UserError

from .checkpoint import read_manifest
from .config import Config
from .initial_weights import CheckpointWeights
from .model import ModelSettings
from .model.linear import block_shapes, method_of
from .model.linear.kinds.magnitude_pruned import MagnitudePrunedSettings
from .model.linear.terms import DENSE, Term
from .model.pruning import kept_count, keys, masks


class MaskSource(NamedTuple):
    """A rule, its layers and the weights by which their masks are decided."""

    where: str
    """The rule, as a message names it."""
    rule: MagnitudePrunedSettings
    layers: dict[str, tuple[int, int]]
    """Name to the shape of the weight, [outputs, inputs]."""
    weights: CheckpointWeights


def open_masks(config: Config) -> list[MaskSource]:
    """The sources of the masks that ``mask_from`` names, each checked against the layers it is for.

    Raises:
        UserError: one is no complete checkpoint, or keeps a layer otherwise than as one weight of this shape.
        DataError: one is damaged.
    """
    sources = []
    for number, rule in enumerate(config.model.linear):
        if not isinstance(rule, MagnitudePrunedSettings) or rule.mask_from is None:
            continue
        where, path = f"model.linear.{number} (magnitude_pruned): mask_from = {rule.mask_from!r}", Path(rule.mask_from)
        if read_manifest(path) is None:
            raise UserError(f"{where} is no complete checkpoint. Give a step_... folder of a finished run.")
        source = MaskSource(where, rule, _layers_of(rule, config.model), CheckpointWeights(path))
        _check_layers(source)
        sources.append(source)
    return sources


def decide_masks(source: MaskSource) -> dict[str, Tensor]:
    """The masks of a source's layers, by the names of their buffers.

    Raises:
        UserError: the other run has pruned more than the rule keeps.
    """
    rule, weights = source.rule, source.weights

    def keys_of(name: str) -> Tensor:
        mask = weights.read(f"{name}.mask") if f"{name}.mask" in weights.shapes else None
        return keys(weights.read(f"{name}.weight"), mask)

    sizes = {name: rows * columns for name, (rows, columns) in source.layers.items()}
    share = Fraction(str(rule.sparsity))
    decided = dict(masks(sizes, keys_of, share, rule.scope))
    groups = [list(sizes)] if rule.scope == "global" else [[name] for name in sizes]
    for group in groups:
        size, left = sum(sizes[name] for name in group), sum(int(decided[name].sum()) for name in group)
        if left < kept_count(size, share):
            raise UserError(
                f"{source.where} has only {left / size:.4g} of the weights of {group[0]}"
                f"{' and the other layers' if len(group) > 1 else ''} left, and sparsity {rule.sparsity} would keep "
                f"{1 - rule.sparsity:.4g}: what is pruned does not come back. Give a sparsity of at least "
                f"{1 - left / size:.4g}."
            )
    return {f"{name}.mask": mask for name, mask in decided.items()}


def _layers_of(rule: MagnitudePrunedSettings, settings: ModelSettings) -> dict[str, tuple[int, int]]:
    return {
        name: (outputs, inputs)
        for block in range(settings.layers)
        for inside, (inputs, outputs) in block_shapes(settings, block).items()
        if method_of(name := f"blocks.{block}.{inside}", settings) is rule
    }


def _check_layers(source: MaskSource) -> None:
    told = "Give a run of the same model with dense or magnitude_pruned layers."
    for name, shape in source.layers.items():
        rule = method_of(name, source.weights.settings)
        if rule.terms() not in (DENSE, (Term("weight", mask="mask"),)):
            raise UserError(f"{source.where} keeps {name} as {rule.kind}, of which no entries can be pruned. {told}")
        if source.weights.shapes.get(f"{name}.weight") != shape:
            raise UserError(f"{source.where} has no weight {list(shape)} of {name}. {told}")
