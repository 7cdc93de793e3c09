"""Which parameterization each linear layer gets, and the refusal of rules that can't be meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data_pipeline.errors import UserError
from data_pipeline.settings import build_settings
from pretrain.model import Decoder, ModelSettings
from pretrain.model.linear import layer_shapes, method_of

SHAPE = {"hidden_size": 32, "layers": 3, "heads": 4, "kv_heads": 2, "intermediate_size": 48}


def settings(*rules: dict[str, Any]) -> ModelSettings:
    return build_settings(ModelSettings, {**SHAPE, "linear": list(rules)}, "test")


def refusal(*rules: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        settings(*rules)
    return str(caught.value)


def test_the_shapes_of_a_block_are_those_of_the_decoder() -> None:
    with torch.device("meta"):
        model = Decoder(settings(), 100)
    for name, (in_features, out_features) in layer_shapes(settings()).items():
        assert model.get_submodule(f"blocks.1.{name}").weight.shape == (out_features, in_features)


def test_a_rule_chooses_by_name_and_block() -> None:
    made = settings({"kind": "dense", "modules": ["attention.*", "feed_forward.down"], "layers": "1-2"})
    assert method_of("blocks.1.attention.query", made) is made.linear[0]
    assert method_of("blocks.2.feed_forward.down", made) is made.linear[0]
    for other in ("blocks.0.attention.query", "blocks.1.feed_forward.up", "head"):
        assert method_of(other, made) is not made.linear[0]
        assert method_of(other, made).kind == "dense"


def test_a_single_block_may_be_a_number() -> None:
    """YAML makes one of ``layers: 1``."""
    made = settings({"kind": "dense", "layers": 1})
    assert made.linear[0].layer_range == (1, 1)
    assert made == settings({"kind": "dense", "layers": "1"})
    assert "'linear.0.layers' = True: input should be a valid string" in refusal({"kind": "dense", "layers": True})
    assert "'linear.0.layers' = '-1'" in refusal({"kind": "dense", "layers": -1})


def test_rules_that_can_not_be_meant_are_refused() -> None:
    assert "'mlp.*' matches no layer of a block" in refusal({"kind": "dense", "modules": ["mlp.*"]})
    assert "did you mean 'feed_forward.up'?" in refusal({"kind": "dense", "modules": ["feedforward.up"]})
    assert "layers '2-3' goes beyond the last block" in refusal({"kind": "dense", "layers": "2-3"})
    assert "linear.0 (dense): modules is empty" in refusal({"kind": "dense", "modules": []})
    assert "ends before it begins" in refusal({"kind": "dense", "layers": "2-1"})
    twice = refusal({"kind": "dense", "layers": "1"}, {"kind": "dense", "modules": ["attention.key"]})
    assert "blocks.1.attention.key is matched by linear.0 (dense) already" in twice
    assert "did you mean 'dense'?" in refusal({"kind": "dence"})


MIXED = {**SHAPE, "experts": {"number": 4, "top_k": 2, "intermediate_size": 12, "shared": 2, "dense_first": 1}}


def test_the_linear_layers_of_blocks_with_experts() -> None:
    rule = {"kind": "low_rank", "rank": 4, "modules": ["feed_forward.shared.*", "attention.*"]}
    made = build_settings(ModelSettings, {**MIXED, "linear": [rule]}, "test")
    with torch.device("meta"):
        model = Decoder(made, 100)
    assert model.blocks[1].feed_forward.shared.gate.b.shape == (24, 4)
    assert model.blocks[0].feed_forward.gate.weight.shape == (48, 32)
    assert model.blocks[0].attention.query.b.shape == (32, 4)
    assert model.blocks[1].feed_forward.experts.gate.shape == (4, 12, 32)


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({}, "modules 'feed_forward.*' matches feed_forward.router of block 1, whose experts keep dense weights"),
        ({"modules": ["*.experts.up"]}, "matches no layer of a block"),
        ({"modules": ["feed_forward.gate"], "layers": "1-2"}, "no layer of blocks 1 to 2, which have experts"),
        ({"modules": ["feed_forward.shared.up"], "layers": "0"}, "no layer of blocks 0 to 0, which have none"),
    ],
)
def test_rules_that_experts_can_not_follow(rule: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        build_settings(ModelSettings, {**MIXED, "linear": [{"kind": "low_rank", "rank": 4, **rule}]}, "test")
    assert told in str(caught.value)
    bounded = {"kind": "low_rank", "rank": 4, "layers": "0"}
    assert build_settings(ModelSettings, {**MIXED, "linear": [bounded]}, "test").linear


def test_mup_with_experts_is_refused() -> None:
    base = {"hidden_size": 16, "heads": 4, "intermediate_size": 24}
    with pytest.raises(UserError, match="mup with experts"):
        build_settings(ModelSettings, {**MIXED, "mup": {"base": base}}, "test")
