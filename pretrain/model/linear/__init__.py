"""Linear layers: how each keeps its weight is chosen here, by the rules of ``model.linear``."""

from .base import LinearCost, LinearSettings, block_shapes, layer_shapes
from .choose import check_rules, make_linear, method_of

__all__ = ["LinearCost", "LinearSettings", "block_shapes", "check_rules", "layer_shapes", "make_linear", "method_of"]
