"""Low-rank and CoLA layers: what they compute, what they start as, what they cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.settings import build_settings
from pretrain.model import ModelSettings

from .linear_layers import SHAPES, inputs, layer


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["low_rank", "cola"])
def test_they_compute_two_products(kind: str, shape: tuple[int, int]) -> None:
    made, x = layer(shape, kind=kind, rank=7), inputs(shape)
    a, b, given = (each.detach().double().numpy() for each in (made.a, made.b, x))
    assert (a.shape, b.shape) == ((7, shape[0]), (shape[1], 7))
    inner = given @ a.T
    if kind == "cola":
        inner = inner / (1 + np.exp(-inner))
    np.testing.assert_allclose(made(x).detach().numpy(), inner @ b.T, rtol=1e-5, atol=1e-6)


def test_a_low_rank_weight_starts_with_the_variance_of_the_dense_one() -> None:
    made = layer((512, 384), std=0.03, kind="low_rank", rank=64)
    product = (made.b @ made.a).detach()
    # 512 x 384 entries of BA depend on 64 x 896 values: the tolerance is five times what three seeds showed
    assert float(product.std()) == pytest.approx(0.03, rel=0.02)
    assert made.a.std().item() == pytest.approx(made.b.std().item(), rel=0.02), "balanced"


@pytest.mark.parametrize("shape", [(512, 384), (384, 512)])
def test_cola_starts_as_its_authors_have_it(shape: tuple[int, int]) -> None:
    made = layer(shape, std=0.5, kind="cola", rank=64)
    for factor in (made.a, made.b):
        std = 64**-0.25 * (512 + 384) ** -0.25
        assert factor.std().item() == pytest.approx(std, rel=5 / np.sqrt(2 * factor.numel()))


def test_the_activation_is_a_setting() -> None:
    shape = (24, 40)
    x = inputs(shape)
    by = {name: layer(shape, kind="cola", rank=7, activation=name) for name in ("relu", "gelu", "identity")}
    inner = x @ by["relu"].a.T
    gelu = inner * ((inner / 2**0.5).erf() + 1) / 2
    for name, function in (("relu", inner.relu()), ("identity", inner), ("gelu", gelu)):
        np.testing.assert_allclose(
            by[name](x).detach().numpy(), (function @ by[name].b.T).detach().numpy(), rtol=1e-4, atol=1e-6
        )


def test_a_rank_that_does_not_fit_is_refused() -> None:
    shape = {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate_size": 48}

    def refusal(**content: Any) -> str:
        with pytest.raises(UserError) as caught:
            build_settings(ModelSettings, {**shape, "linear": [content]}, "test")
        return str(caught.value)

    said = refusal(kind="cola", rank=17)
    assert "linear.0 (cola): attention.key [16, 32]: rank 17 is above the smaller of its sides" in said
    assert "32 inputs and 16 outputs; the largest rank it can have is 16" in said
    assert "feed_forward.gate [48, 32]: rank 33" in refusal(kind="low_rank", rank=33, modules=["feed_forward.*"])
    assert "'linear.0.rank' = 0: input should be greater than or equal to 1" in refusal(kind="low_rank", rank=0)
    assert "'linear.0.rank' is missing" in refusal(kind="low_rank")
    assert "did you mean 'silu'?" in refusal(kind="cola", rank=4, activation="silo")
    build_settings(ModelSettings, {**shape, "linear": [{"kind": "cola", "rank": 16}]}, "test")
