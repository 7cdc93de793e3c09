"""What each parameterization says that it costs, against what it does: counted, not computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from .linear_layers import inputs, layer, rule

RULES: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "low_rank": {"kind": "low_rank", "rank": 5},
    "cola": {"kind": "cola", "rank": 5},
    "cola, relu": {"kind": "cola", "rank": 5, "activation": "relu"},
    "lost": {"kind": "lost", "rank": 5, "column_fraction": 0.1},
    "lost, gelu": {"kind": "lost", "rank": 5, "activation": "gelu"},
    "lost, relu": {"kind": "lost", "rank": 5, "activation": "relu"},
    "lost, identity": {"kind": "lost", "rank": 5, "activation": "identity"},
    "lost, gamma 1": {"kind": "lost", "rank": 5, "gamma": 1.0, "activation": "relu"},
    "lost, gamma 0": {"kind": "lost", "rank": 5, "gamma": 0.0},
    "column_sparse": {"kind": "column_sparse", "column_fraction": 0.3},
}
WHOLE = {"dense"}
"""Rules whose layers hold a whole weight, or make one."""

SHAPES = [(64, 48), (48, 64)]


def kept_values(run: Callable[[], Tensor], *known: Tensor) -> int:
    """Floating-point values that ``run`` keeps for its backward pass, each piece of memory once, besides ``known``."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    for tensor in known:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    del output
    return sum(kept.values())


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation inside makes."""

    size = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel())
        return result


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", RULES)
def test_costs(name: str, shape: tuple[int, int]) -> None:
    cost, made, x = rule(64, **RULES[name]).cost(*shape), layer(shape, **RULES[name]), inputs(shape)
    tokens = x.shape[0] * x.shape[1]
    assert sum(parameter.numel() for parameter in made.parameters()) == cost.parameters
    assert sum(buffer.numel() * buffer.element_size() for buffer in made.buffers()) == cost.buffer_bytes
    assert kept_values(lambda: made(x), x, *made.parameters()) == tokens * cost.activations
    of_input = tokens * shape[0] if cost.keeps_input else 0
    assert kept_values(lambda: made(x), *made.parameters()) == tokens * cost.activations + of_input
    with FlopCounterMode(display=False) as counter:
        y = made(x)
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == 2 * tokens * cost.multiplied
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [name for name in RULES if name not in WHOLE])
def test_no_dense_weight_is_made(name: str, shape: tuple[int, int]) -> None:
    made, x = layer(shape, **RULES[name]), inputs(shape)
    with Largest() as seen:
        made(x).sum().backward()
    assert 0 < seen.size < shape[0] * shape[1]


def test_a_dense_layer_is_seen_to_make_its_gradient() -> None:
    made, x = nn.Linear(64, 48, bias=False), inputs((64, 48))
    with Largest() as seen:
        made(x).sum().backward()
    assert seen.size == 64 * 48
