"""Parameters and arithmetic against figures worked out by hand, for every shipped shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.settings import build_settings
from pretrain.model import (
    ModelSettings,
    count_parameters,
    flops_per_token,
    linear_layers,
    moment_flops_per_step,
)
from pretrain.model.linear.head import logit_moments

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("name", "d", "d_ff", "layers", "heads", "millions"),
    [
        ("llama_60m", 512, 1376, 8, 8, 58.07),
        ("llama_130m", 768, 2048, 12, 12, 134.11),
        ("llama_1b", 2048, 5461, 24, 32, 1339.08),
        ("llama_7b", 4096, 11008, 32, 32, 6738.42),
    ],
)
def test_shipped_shapes(name: str, d: int, d_ff: int, layers: int, heads: int, millions: float) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text()
    section = OmegaConf.to_container(OmegaConf.create(text))["model"]
    settings = build_settings(ModelSettings, section, name)
    assert (settings.hidden_size, settings.intermediate_size, settings.layers) == (d, d_ff, layers)
    assert (settings.heads, settings.effective_kv_heads, settings.tied_embeddings) == (heads, heads, False)
    assert settings.vocab_size == 32_000
    count = count_parameters(settings, 32_000)
    assert round(count.total / 1e6, 2) == millions
    assert count.total == 2 * 32_000 * d + layers * (4 * d * d + 3 * d * d_ff) + (2 * layers + 1) * d
    assert f"{millions:.2f}M parameters" in text


def test_counts_of_a_small_model_by_hand() -> None:
    shape = {"hidden_size": 8, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 4, "intermediate_size": 10}
    # attention: query and output 8 x 16, key and value 8 x 8; feed-forward: 3 of 8 x 10
    matrices = 2 * (2 * 128 + 2 * 64 + 3 * 80)
    gains = 2 * (8 + 8 + 4 + 4) + 8
    untied = count_parameters(ModelSettings(**shape, qk_norm=True), 100)
    assert untied == (1600 + matrices + gains, matrices + gains, 1600 + matrices + gains, matrices + 800)
    tied = count_parameters(ModelSettings(**shape, qk_norm=True, tied_embeddings=True), 100)
    assert tied == (800 + matrices + gains, matrices + gains, 800 + matrices + gains, matrices + 800)


@pytest.mark.parametrize("shared", [0, 1, 3])
def test_counts_of_experts_by_hand(shared: int) -> None:
    """The first block dense, two of eight experts and shared ones, which all tokens go to, in the others."""
    mixture = {"number": 8, "top_k": 2, "intermediate_size": 5, "shared": shared, "dense_first": 1}
    shape = {"hidden_size": 8, "layers": 3, "heads": 2, "intermediate_size": 10, "experts": mixture}
    settings = build_settings(ModelSettings, shape, "test")
    count = count_parameters(settings, 100)
    attention, gains, router, expert = 4 * 64, 2 * 8, 8 * 8, 3 * 8 * 5
    outside = 2 * 800 + 8
    always = outside + 3 * (attention + gains) + 3 * 8 * 10 + 2 * router
    assert count.total == always + 2 * (8 + shared) * expert
    assert count.active == always + 2 * (2 + shared) * expert
    assert count.non_embedding == count.total - 2 * 800
    assert count.multiplied == count.active - 800 - 7 * 8
    assert flops_per_token(settings, 100, 16) == 6 * count.multiplied + 12 * 3 * 8 * 16


# algorithms.md 2.4, in millions: embeddings and norms included; ranks of the papers
TABLE = {
    "60m": (128, {"dense": 58.07, "cola": 42.77, "low_rank": 42.77, "lost 0.01": 43.02, "lost 0.05": 44.01}),
    "130m": (256, {"dense": 134.11, "cola": 94.00, "low_rank": 94.00, "lost 0.01": 94.78, "lost 0.05": 98.21}),
    "1b": (512, {"dense": 1339.08, "cola": 609.31, "low_rank": 609.31, "lost 0.01": 621.14, "lost 0.05": 669.52}),
}


@pytest.mark.parametrize("size", TABLE)
def test_factorised_models_have_the_published_numbers(size: str) -> None:
    text = (CONFIGS / f"llama_{size}.yaml").read_text()
    section = OmegaConf.to_container(OmegaConf.create(text))["model"]
    rank, columns = TABLE[size]
    for column, millions in columns.items():
        kind, _, fraction = column.partition(" ")
        rule = {"kind": kind, **({} if kind == "dense" else {"rank": rank})}
        rule |= {"column_fraction": float(fraction)} if fraction else {}
        settings = build_settings(ModelSettings, {**section, "linear": [rule]}, column)
        count = count_parameters(settings, 32_000)
        assert round(count.total / 1e6, 2) == millions, column
        of_layers = sum(layer.cost.parameters for layer in linear_layers(settings))
        gains = (2 * settings.layers + 1) * settings.hidden_size
        assert count.non_embedding == of_layers + gains, "what the layers say is what they have"
        assert count.multiplied == of_layers + 32_000 * settings.hidden_size


def test_a_rule_counts_where_it_holds() -> None:
    rule = {"kind": "cola", "rank": 3, "modules": ["attention.*"], "layers": "1"}
    settings = build_settings(
        ModelSettings, {"hidden_size": 8, "layers": 2, "heads": 2, "intermediate_size": 10, "linear": [rule]}, "test"
    )
    kinds = {layer.name: layer.method.kind for layer in linear_layers(settings)}
    assert len(kinds) == 14
    assert [name for name, kind in kinds.items() if kind == "cola"] == [
        f"blocks.1.attention.{each}" for each in ("query", "key", "value", "output")
    ]
    dense, factors = 2 * 3 * 80 + 4 * 64, 4 * 3 * 16
    assert count_parameters(settings, 100).multiplied == dense + factors + 800
    assert flops_per_token(settings, 100, 4) == 6 * (dense + factors + 800) + 12 * 2 * 8 * 4


def test_flops_are_palms_formula() -> None:
    settings = ModelSettings(hidden_size=8, layers=2, heads=4, kv_heads=2, head_dim=4, intermediate_size=10)
    # 6 x (2 x 624 + 800) for the weights; 12 x L 2 x H 4 x d_h 4 x T 32 for attention
    assert flops_per_token(settings, vocab_size=100, seq_len=32) == 12_288 + 12_288
    llama_7b = ModelSettings(hidden_size=4096, layers=32, heads=32, intermediate_size=11_008)
    # 6 x (32 x 202,375,168 + 131,072,000) + 12 x 32 x 4096 x 2048
    assert flops_per_token(llama_7b, 32_000, 2048) == 39_642_464_256 + 3_221_225_472


def test_flops_of_the_moments_of_the_logits() -> None:
    """Against what an operation counter sees of the head: the products with C, and the sum of features besides."""
    vocabulary, width, tokens = 100, 8, 30
    settings = ModelSettings(hidden_size=width, layers=1, heads=2, intermediate_size=10)
    weight, x = torch.randn(vocabulary, width, requires_grad=True), torch.randn(tokens, width, requires_grad=True)
    labels = torch.arange(tokens)
    with FlopCounterMode(display=False) as counter:
        logit_moments(x, weight, labels).sum().backward()
    once = moment_flops_per_step(settings, vocabulary)
    assert counter.get_total_flops() == 6 * width**2 * tokens + once + 2 * width * tokens
    head = flops_per_token(settings, vocabulary, 4) - flops_per_token(settings, vocabulary, 4, from_moments=True)
    assert head == 6 * width * (vocabulary - width)
    assert once == 4 * vocabulary * width**2
