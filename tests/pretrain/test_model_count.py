"""Parameters and arithmetic against figures worked out by hand, for every shipped shape."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from data_pipeline.settings import build_settings
from pretrain.model import ModelSettings, count_parameters, flops_per_token

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
    assert untied == (1600 + matrices + gains, matrices + gains, matrices + 800)
    tied = count_parameters(ModelSettings(**shape, qk_norm=True, tied_embeddings=True), 100)
    assert tied == (800 + matrices + gains, matrices + gains, matrices + 800)


def test_flops_are_palms_formula() -> None:
    settings = ModelSettings(hidden_size=8, layers=2, heads=4, kv_heads=2, head_dim=4, intermediate_size=10)
    # 6 x (2 x 624 + 800) for the weights; 12 x L 2 x H 4 x d_h 4 x T 32 for attention
    assert flops_per_token(settings, vocab_size=100, seq_len=32) == 12_288 + 12_288
    llama_7b = ModelSettings(hidden_size=4096, layers=32, heads=32, intermediate_size=11_008)
    # 6 x (32 x 202,375,168 + 131,072,000) + 12 x 32 x 4096 x 2048
    assert flops_per_token(llama_7b, 32_000, 2048) == 39_642_464_256 + 3_221_225_472
