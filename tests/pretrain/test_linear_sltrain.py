"""SLTrain's layer against a dense weight written out, and its counts against the published ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.settings import build_settings
from pretrain.model import ModelSettings, count_parameters
from pretrain.model.initialize import Draw
from pretrain.model.linear.kinds.sltrain import SLTrainLinear, SLTrainSettings, _position_type

IN, OUT, RANK, ALPHA, FRACTION = 24, 17, 5, 32.0, 0.1
ENTRIES = 40  # ⌊0.1 · 24 · 17⌋
SHAPES = {
    "60M": {"hidden_size": 512, "intermediate_size": 1376, "layers": 8, "heads": 8},
    "130M": {"hidden_size": 768, "intermediate_size": 2048, "layers": 12, "heads": 12},
    "1B": {"hidden_size": 2048, "intermediate_size": 5461, "layers": 24, "heads": 32},
}


def settings(**changes: Any) -> SLTrainSettings:
    given = {"kind": "sltrain", "rank": RANK, "alpha": ALPHA, "nonzero_fraction": FRACTION, **changes}
    return build_settings(SLTrainSettings, given, "test")


def layer(dtype: torch.dtype = torch.float64, name: str = "layer", seed: int = 1) -> SLTrainLinear:
    made = settings().make(IN, OUT, 0.02)
    assert isinstance(made, SLTrainLinear)
    values = made.initial_values(Draw(name, seed))
    assert values.keys() == made.state_dict().keys()
    made.load_state_dict(values)
    return made.to(dtype)


def trained(dtype: torch.dtype = torch.float64) -> SLTrainLinear:
    """A layer whose B is not 0 any more."""
    made = layer()
    torch.nn.init.normal_(made.b, generator=torch.Generator().manual_seed(3))
    return made.to(dtype)


def dense_weight(made: SLTrainLinear) -> Tensor:
    """α/r B A + S entry by entry."""
    weight = ALPHA / RANK * torch.einsum("mr,rn->mn", made.b, made.a)
    rows, columns = made.positions.long() // IN, made.positions.long() % IN
    return weight + torch.zeros_like(weight).index_put((rows, columns), made.values)


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(dtype)


def results(made: SLTrainLinear, x: Tensor, dense: bool) -> list[Tensor]:
    """The output and all gradients, of the layer or of the dense weight."""
    x = x.clone().requires_grad_()
    made.zero_grad()
    y = F.linear(x, dense_weight(made)) if dense else made(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), *(each.grad.clone() for each in (x, made.a, made.b, made.values) if each.grad is not None)]


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_output_and_gradients_are_those_of_the_dense_weight(shape: tuple[int, ...]) -> None:
    made, x = trained(), inputs(*shape)
    found, expected = results(made, x, False), results(made, x, True)
    assert len(found) == len(expected) == 5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_gradients_are_those_of_finite_differences() -> None:
    made = trained()

    def product(x: Tensor, a: Tensor, b: Tensor, values: Tensor) -> Tensor:
        given = {"a": a, "b": b, "values": values}
        output: Tensor = torch.func.functional_call(made, given, (x,))
        return output

    tensors = [each.detach().clone().requires_grad_() for each in (inputs(2, 3), made.a, made.b, made.values)]
    assert torch.autograd.gradcheck(product, tensors)


def test_bf16() -> None:
    made, exact = trained(torch.bfloat16), trained()
    found = results(made, inputs(4, dtype=torch.bfloat16), False)
    for one, other in zip(found, results(exact, inputs(4), True), strict=True):
        assert one.dtype == torch.bfloat16
        assert float((one.double() - other).norm() / other.norm()) < 0.02


def test_no_dense_matrix_is_kept_for_the_backward_pass() -> None:
    made, kept = trained(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        made(inputs(3).requires_grad_())
    own = {each.data_ptr() for each in (made.a, made.b, made.values, made.positions)}
    assert [tuple(each.shape) for each in kept if each.data_ptr() not in own] == [(3, IN)]


def test_initial_values() -> None:
    made, bound = layer(), IN**-0.5
    assert made.b.eq(0).all()
    for values in (made.a.detach(), made.values.detach()):
        assert float(values.abs().max()) <= bound
        # the standard deviation of a uniform distribution, and five standard errors of it
        assert float(values.std()) == pytest.approx(bound / 3**0.5, rel=5 * (0.2 / values.numel()) ** 0.5)
    assert made.positions.numel() == ENTRIES
    assert made.positions.dtype == torch.int32
    assert made.positions.diff().gt(0).all()
    assert 0 <= int(made.positions[0]) < int(made.positions[-1]) < IN * OUT


def test_golden_values() -> None:
    """Positions and weights of a seed stay what they were: over versions of Headrace and of numpy."""
    made = layer()
    assert made.positions[:6].tolist() == [2, 7, 9, 18, 20, 29]
    assert made.a[0, :2].tolist() == pytest.approx([-0.0911125243, 0.0412391275], rel=1e-6)
    assert made.values[:2].tolist() == pytest.approx([0.0292788036, -0.0095830383], rel=1e-6)


def test_positions_hang_on_seed_and_name_and_are_spread_evenly() -> None:
    assert torch.equal(layer(name="a").positions, layer(name="a").positions)
    assert not torch.equal(layer(name="a").positions, layer(name="b").positions)
    assert not torch.equal(layer(seed=1).positions, layer(seed=2).positions)
    counts = torch.zeros(IN * OUT)
    for seed in range(400):
        counts[layer(seed=seed).positions.long()] += 1
    share = ENTRIES / (IN * OUT)
    # a binomial count for every place: the variance over places, with five standard errors
    expected = 400 * share * (1 - share)
    assert float(counts.var()) == pytest.approx(expected, rel=5 * (2 / (IN * OUT)) ** 0.5)


def test_positions_of_a_matrix_beyond_int32_are_int64() -> None:
    assert _position_type(2**31 - 1) == torch.int32
    assert _position_type(2**31) == torch.int64


@pytest.mark.parametrize(("size", "rank", "millions"), [("60M", 128, 43.53), ("130M", 256, 96.55), ("1B", 512, 645.55)])
def test_parameters_are_the_published_ones(size: str, rank: int, millions: float) -> None:
    rule = {"kind": "sltrain", "rank": rank, "alpha": 16.0}
    model = build_settings(ModelSettings, {**SHAPES[size], "linear": [rule]}, "test")
    assert round(count_parameters(model, 32000).total / 1e6, 2) == millions


def test_the_cost_is_that_of_the_layer() -> None:
    made, cost = layer(), settings().cost(IN, OUT)
    assert cost.parameters == sum(parameter.numel() for parameter in made.parameters())
    assert cost.buffer_bytes == made.positions.nbytes
    assert (cost.multiplied, cost.activations) == (IN * OUT, 0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank": 49}, "rank 49 is above the smaller of its sides"),
        ({"nonzero_fraction": 0.0}, "nonzero_fraction"),
        ({"nonzero_fraction": 1.1}, "nonzero_fraction"),
        ({"nonzero_fraction": 1e-4}, "leaves the sparse part no entry; give at least 0.00098"),
        ({"alpha": 0.0}, "alpha"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], reason: str) -> None:
    shape = {"hidden_size": 32, "layers": 2, "heads": 4, "intermediate_size": 48}
    rule = {"kind": "sltrain", "rank": 4, "alpha": 8.0, **changes}
    with pytest.raises(UserError, match=reason):
        build_settings(ModelSettings, {**shape, "linear": [rule]}, "test")
