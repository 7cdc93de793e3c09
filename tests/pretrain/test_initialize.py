"""Initial weights: from (seed, name) alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from pretrain.model import Decoder, ModelSettings, initial_values, initialize_, own_tensors
from pretrain.model.initialize import normal

SETTINGS = ModelSettings(hidden_size=64, layers=3, heads=4, kv_heads=2, intermediate_size=96, qk_norm=True)
VOCAB = 50


def weights(seed: int, settings: ModelSettings = SETTINGS) -> dict[str, Tensor]:
    model = Decoder(settings, VOCAB)
    initialize_(model, seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_golden_values() -> None:
    """Weights of a seed stay what they were: over versions of Headrace and of numpy."""
    values = weights(1)
    golden = {
        "embedding.weight": [0.00902122911, -0.000507346762, -0.00712064561],
        "blocks.0.attention.query.weight": [-0.00272375369, -0.0298288912, 0.0175392441],
        "blocks.2.feed_forward.down.weight": [0.00443939073, 0.0167216435, -5.60409935e-05],
        "head.weight": [-0.00475234911, -0.0167166498, -0.0046248599],
    }
    for name, first in golden.items():
        assert values[name][0, :3].tolist() == pytest.approx(first, rel=1e-6)


def test_the_generator_is_keyed_by_the_whole_seed_and_name() -> None:
    def first(name: str, seed: int) -> list[float]:
        return normal(name, (4,), 1.0, seed).tolist()

    assert first("a.weight", 1) == first("a.weight", 1)
    different = [("a.weight", 1), ("b.weight", 1), ("a.weight", 2), ("a.weight", 1 + 2**32), ("a.weight", 1 + 2**62)]
    assert len({tuple(first(*key)) for key in different}) == len(different)


def test_order_of_construction_and_other_parameters_do_not_matter() -> None:
    straight = weights(4)
    model = Decoder(SETTINGS, VOCAB)
    torch.manual_seed(99)
    made = {}
    for owner in reversed(own_tensors(model)):
        torch.randn(3)
        made |= {f"{owner}.{name}": value for name, value in initial_values(model, owner, 4).items()}
    assert made.keys() == straight.keys()
    for name, value in made.items():
        assert torch.equal(value, straight[name]), name
    fewer = weights(4, SETTINGS.model_copy(update={"layers": 1, "init_scaled_residual": False}))
    unscaled = [name for name in fewer if not name.endswith(("output.weight", "down.weight"))]
    assert len(unscaled) == len(fewer) - 2
    for name in unscaled:
        assert torch.equal(fewer[name], straight[name]), name


def test_construction_draws_nothing_from_the_global_generator() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    weights(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_models_made_on_the_meta_device_get_the_same_weights() -> None:
    with torch.device("meta"):
        model = Decoder(SETTINGS, VOCAB)
    straight = weights(4)
    for owner, tensors in own_tensors(model).items():
        values = initial_values(model, owner, 4)  # one module at a time, of a model that holds no data
        for name, tensor in tensors.items():
            assert values[name].device.type == "cpu"
            assert values[name].dtype == torch.float32
            assert values[name].shape == tensor.shape
            assert torch.equal(values[name], straight[f"{owner}.{name}"])
    model.to_empty(device="cpu")
    initialize_(model, 4)
    for name, expected in weights(4).items():
        assert torch.equal(model.get_parameter(name), expected)


def test_bf16_weights_are_the_fp32_ones_rounded() -> None:
    model = Decoder(SETTINGS, VOCAB).bfloat16()
    initialize_(model, 4)
    for name, expected in weights(4).items():
        assert torch.equal(model.get_parameter(name), expected.bfloat16())


@pytest.mark.parametrize("scaled", [False, True])
def test_standard_deviations(scaled: bool) -> None:
    settings = SETTINGS.model_copy(update={"init_std": 0.05, "init_scaled_residual": scaled})
    for name, value in weights(1, settings).items():
        if name.split(".")[-2].endswith("norm"):
            assert value.eq(1).all()
            continue
        writes_residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
        std = 0.05 / math.sqrt(6) if scaled and writes_residual else 0.05
        # five standard errors of a sample mean and of a sample standard deviation
        assert abs(float(value.mean())) < 5 * std / math.sqrt(value.numel())
        assert float(value.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * value.numel()))


def test_parameters_of_a_foreign_module_are_not_left_to_chance() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"Linear \('0'\) has tensors but no initial_values method"):
        initialize_(model, 1)
