"""A layer's terms say what it computes: the merged weight and the exported module give what the layer gives."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest
import torch

from pretrain.export.modeling_headrace import HeadraceLinear
from pretrain.model.linear import LinearSettings, kinds
from pretrain.model.linear.terms import DENSE, Term, mergeable, merged

from .linear_layers import SHAPES, inputs, layer, rule

LAYERS: dict[str, list[dict[str, Any]]] = {
    "dense": [{}],
    "low_rank": [{"rank": 5}],
    "cola": [{"rank": 5, "activation": name} for name in ("silu", "gelu", "relu", "identity")],
    "lost": [
        {"rank": 5, "column_fraction": 0.2, "gamma": gamma, **({} if gamma == 0.0 else {"activation": name})}
        if gamma < 1.0
        else {"rank": 5, "gamma": gamma, "activation": name}
        for gamma in (0.0, 0.3, 1.0)
        for name in ("silu", "identity")
    ],
    "column_sparse": [{"column_fraction": 0.2}],
    "sltrain": [{"rank": 5, "alpha": 8.0, "nonzero_fraction": 0.1}],
    "magnitude_pruned": [{"sparsity": 0.5, "mask_from": "nowhere"}],
}
CASES = [(kind, settings) for kind, cases in LAYERS.items() for settings in cases]


def test_every_kind_says_its_terms() -> None:
    for entry in pkgutil.iter_modules(kinds.__path__):
        module = importlib.import_module(f"{kinds.__name__}.{entry.name}")
        (settings,) = (
            each
            for each in vars(module).values()
            if isinstance(each, type) and issubclass(each, LinearSettings) and each.__module__ == module.__name__
        )
        assert settings.terms is not LinearSettings.terms, entry.name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_terms_are_what_the_layer_computes(kind: str, settings: dict[str, Any], shape: tuple[int, int]) -> None:
    made, terms = layer(shape, kind=kind, **settings), rule(max(shape), kind=kind, **settings).terms()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # some start at zero
        if kind == "magnitude_pruned":
            made.mask[:, ::3] = False
        x, state = inputs(shape).detach(), made.state_dict()
        expected = made(x)
        tensors = {
            name: (list(value.shape), "float" if value.is_floating_point() else str(value.dtype).split(".")[1])
            for name, value in state.items()
        }
        exported = HeadraceLinear(*shape, tensors, [term._asdict() for term in terms])
        exported.load_state_dict(state)
        torch.testing.assert_close(exported(x), expected, atol=1e-5, rtol=1e-5)
        if mergeable(terms):
            weight = merged(terms, state.__getitem__, *shape)
            torch.testing.assert_close(x @ weight.T, expected, atol=1e-5, rtol=1e-5)
        else:
            assert settings["activation"] != "identity"
    assert (terms == DENSE) == (kind == "dense")
    named = {name for term in terms for name in (term.weight, term.down, term.columns, term.mask, term.places) if name}
    assert named == state.keys()


def test_a_dense_weight_is_given_as_it_is() -> None:
    weight = torch.randn(3, 2).bfloat16()
    assert merged(DENSE, {"weight": weight}.__getitem__, 2, 3) is weight


def test_terms_add_up() -> None:
    """By hand: 2 · W[:, (1, 0)] down, a masked W and values at places."""
    tensors = {
        "w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "columns": torch.tensor([1, 2]),
        "mask": torch.tensor([[True, False, True], [False, True, True]]),
        "whole": torch.arange(6.0).view(2, 3),
        "places": torch.tensor([0, 5], dtype=torch.int32),
        "values": torch.tensor([10.0, 20.0]),
    }
    terms = (Term("w", columns="columns", scale=2.0), Term("whole", mask="mask"), Term("values", places="places"))
    expected = torch.tensor([[0.0 + 10.0, 2.0, 4.0 + 2.0], [0.0, 6.0 + 4.0, 8.0 + 5.0 + 20.0]])
    assert torch.equal(merged(terms, tensors.__getitem__, 3, 2), expected)
