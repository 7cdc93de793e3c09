"""muP: every tensor's initial weights, factors and multipliers by the table of algorithms, and its exact off switch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError
from data_pipeline.settings import build_settings
from pretrain.model import Decoder, ModelSettings, initialize_
from pretrain.model.mup import WidthScaling, base_model, width, width_scaling
from pretrain.optimizer import AdamWSettings, parameter_groups
from pretrain.optimizer.kinds.muon import MuonSettings
from pretrain.plan_mup import mup_rows, show_mup

from .steps import tiny_config

# 4 query heads on 2 key-value heads of 12, 56 inside the feed-forward: m is 3 for the hidden size, 2 for the heads'
# outputs, 7 for the feed-forward's inside
SHAPE = {"hidden_size": 48, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 12, "intermediate_size": 56}
BASE = {"hidden_size": 16, "heads": 4, "head_dim": 6, "intermediate_size": 8}
ITSELF = {"hidden_size": 48, "heads": 4, "head_dim": 12, "intermediate_size": 56}
M = {
    "attention.query": 3,
    "attention.key": 3,
    "attention.value": 3,
    "attention.output": 2,
    "feed_forward.gate": 3,
    "feed_forward.up": 3,
    "feed_forward.down": 7,
}
VOCABULARY = 40


def settings(mup: dict[str, Any] | None = None, **changes: Any) -> ModelSettings:
    return build_settings(ModelSettings, {**SHAPE, **changes, "mup": mup}, "model")


def decoder(mup: dict[str, Any] | None = None, **changes: Any) -> Decoder:
    model = Decoder(settings(mup, **changes), VOCABULARY)
    initialize_(model, 3)
    return model


def m_of(name: str) -> int:
    """m of a hidden matrix by the table above; 1 for everything else."""
    return next((m for layer, m in M.items() if name.endswith(f"{layer}.weight")), 1)


def forward(model: Decoder) -> Tensor:
    tokens = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    logits: Tensor = model(tokens, torch.arange(9).expand(2, 9), torch.zeros(2, 9, dtype=torch.long), True)
    return logits


def test_m_is_the_ratio_of_the_columns_of_the_weights() -> None:
    wide, narrow = decoder(), decoder(hidden_size=16, head_dim=6, intermediate_size=8)
    found = {
        name: width(name.removesuffix(".weight"), settings({"base": BASE}))
        for name, parameter in wide.named_parameters()
        if parameter.ndim == 2 and "embedding" not in name
    }
    assert found == {name: wide.get_parameter(name).shape[1] / narrow.get_parameter(name).shape[1] for name in found}
    assert {name: m for name, m in found.items() if "head" not in name} == {
        name: m_of(name) for name in found if "blocks" in name
    }
    assert found["head.weight"] == 3


@pytest.mark.parametrize("tied", [False, True])
def test_initial_weights_are_those_of_the_table(tied: bool) -> None:
    plain = dict(decoder(tied_embeddings=tied).named_parameters())
    for name, parameter in decoder({"base": BASE}, tied_embeddings=tied).named_parameters():
        torch.testing.assert_close(parameter, plain[name] / math.sqrt(m_of(name)), msg=name)


def test_head_and_query_start_at_zero_if_asked() -> None:
    plain = dict(decoder({"base": BASE}).named_parameters())
    for name, parameter in decoder({"base": BASE, "zero_init_head": True}).named_parameters():
        assert torch.equal(parameter, 0 * plain[name] if name == "head.weight" else plain[name]), name
    for name, parameter in decoder({"base": BASE, "zero_init_query": True}).named_parameters():
        assert torch.equal(parameter, 0 * plain[name] if name.endswith("query.weight") else plain[name]), name


def scaling(mup: dict[str, Any] | None) -> Callable[[str], WidthScaling]:
    return partial(width_scaling, settings=settings(mup), rate=AdamWSettings().mup_rate)


def groups(model: nn.Module, mup: dict[str, Any] | None, **optimizer: Any) -> list[dict[str, Any]]:
    return parameter_groups(model.named_parameters(), AdamWSettings(**optimizer), scaling(mup))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize("scaled_decay", [False, True])
def test_groups_are_those_of_the_table(tied: bool, decay_all: bool, scaled_decay: bool) -> None:
    model = decoder({"base": BASE}, tied_embeddings=tied)
    mup = {"base": BASE, "scale_weight_decay": scaled_decay}
    made = groups(model, mup, weight_decay=0.3, decay_norms_and_embeddings=decay_all)
    of = {name: group for group in made for name in group["names"]}
    assert sorted(of) == sorted(name for name, _ in model.named_parameters())
    assert sum(len(group["params"]) for group in made) == len(of)
    for name, group in of.items():
        exempt = ("norm" in name or "embedding" in name) and not decay_all
        assert group["lr_scale"] == 1 / m_of(name)
        assert group["weight_decay"] == (0.0 if exempt else 0.3 * (m_of(name) if scaled_decay else 1))
        assert group["gradient_scale"] == 1 / 3
        place = group["names"].index(name)
        assert group["params"][place] is model.get_parameter(name)
    # decayed first, then the highest rate first
    rates = [1, 1 / 2, 1 / 3, 1 / 7] if decay_all or not tied else [1 / 2, 1 / 3, 1 / 7]
    assert [group["lr_scale"] for group in made] == (rates if decay_all else [*rates, 1])


def test_the_groups_do_not_depend_on_the_order_of_the_parameters_or_on_the_decay() -> None:
    model, mup = decoder({"base": BASE}), {"base": BASE}
    backwards = list(model.named_parameters())[::-1]
    one = groups(model, mup)
    other = parameter_groups(backwards, AdamWSettings(), scaling(mup))
    assert [set(group["names"]) for group in one] == [set(group["names"]) for group in other]
    undecayed = groups(model, mup, weight_decay=0.0)
    assert [group["names"] for group in one] == [group["names"] for group in undecayed]


def test_adams_eps_keeps_its_proportion_to_the_gradients() -> None:
    model = decoder({"base": BASE})
    scaled = AdamWSettings(eps=0.06).build(groups(model, {"base": BASE}))
    plain = AdamWSettings(eps=0.06).build(groups(model, None))
    assert [group["eps"] for group in scaled.param_groups] == pytest.approx([0.02] * 5)
    assert [group["eps"] for group in plain.param_groups] == [0.06] * 2


def test_muon_keeps_the_largest_singular_value_of_an_update_in_proportion() -> None:
    """By hand: to √(out / in), for a weight that widens on both sides, on one, and one that turns from tall to wide."""
    original, matched = (MuonSettings(adjust_lr=how).mup_rate for how in ("original", "match_rms_adamw"))
    assert original((400, 100), (100, 25)) == pytest.approx(1.0)
    assert original((100, 400), (25, 100)) == pytest.approx(1.0)
    assert original((100, 400), (100, 100)) == pytest.approx(1 / 2)
    assert original((100, 400), (400, 100)) == pytest.approx(1 / 2)
    assert matched((400, 100), (100, 25)) == pytest.approx(1 / 2)
    assert matched((100, 400), (25, 100)) == pytest.approx(1 / 2)
    assert matched((100, 400), (100, 100)) == pytest.approx(1 / 4)
    for rate in (original, matched, AdamWSettings().mup_rate):
        assert rate((7, 3), (7, 3)) == 1.0


def test_kv_heads_of_the_base_are_in_proportion_unless_given() -> None:
    def made(**base: int) -> ModelSettings:
        return base_model(settings({"base": {**BASE, **base}}))

    assert (made().heads, made().effective_kv_heads) == (4, 2)
    assert made(heads=8, kv_heads=4).effective_kv_heads == 4
    assert made(heads=8).effective_kv_heads == 4
    assert made(heads=1).effective_kv_heads == 1


def test_an_optimizer_without_a_rule_is_refused_with_the_reason() -> None:
    galore = {"kind": "galore", "rank": 2}
    tiny_config(optimizer=galore)
    with pytest.raises(UserError, match=r"optimizer.kind galore: how its learning rate .* confirmed nowhere"):
        tiny_config(optimizer=galore, model={"mup": {"base": {**BASE, "intermediate_size": 48}}})


def test_a_factorised_layer_is_refused_with_the_reason() -> None:
    rule = {"kind": "cola", "rank": 4, "modules": ["attention.key"]}
    settings(linear=[rule])
    with pytest.raises(UserError, match=r"linear.0 \(cola\): muP's published table scales dense weights"):
        settings({"base": BASE}, linear=[rule])
    assert settings({"base": BASE}, linear=[{"kind": "dense"}]).mup


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_the_forward_pass_has_the_multipliers_of_the_table(tied: bool, qk_norm: bool) -> None:
    """Against the plain decoder with the multipliers hooked in: the scores' as one on the rotated, linear query."""
    mup = {"base": BASE, "embedding_multiplier": 5.0, "output_multiplier": 1.5}
    scaled = decoder(mup, tied_embeddings=tied, qk_norm=qk_norm, init_std=0.3)
    plain = decoder(tied_embeddings=tied, qk_norm=qk_norm, init_std=0.3)
    plain.load_state_dict(scaled.state_dict())
    assert not torch.allclose(forward(scaled), forward(plain))

    def times(factor: float) -> Any:
        return lambda module, given, output: factor * output

    plain.embedding.register_forward_hook(times(5.0))
    plain.head.register_forward_hook(times(1.5 / 3))
    for block in plain.blocks:
        # scores are q k / sqrt(12) there, and shall be sqrt(6) q k / 12
        query = block.attention.query_norm if qk_norm else block.attention.query
        query.register_forward_hook(times(math.sqrt(6 / 12)))
    torch.testing.assert_close(forward(scaled), forward(plain), rtol=1e-4, atol=1e-5)


def test_scores_are_eight_over_the_head_size_for_a_base_of_64() -> None:
    base = {"hidden_size": 256, "heads": 4, "intermediate_size": 8}
    attention = decoder({"base": base}, head_dim=128).blocks[0].attention
    assert attention.scale == pytest.approx(8 / 128)


@pytest.mark.parametrize("tied", [False, True])
def test_at_its_base_shape_it_is_the_standard_parametrisation_to_the_bit(tied: bool) -> None:
    plain, scaled = decoder(tied_embeddings=tied), decoder({"base": ITSELF}, tied_embeddings=tied)
    for (name, one), (_, other) in zip(plain.named_parameters(), scaled.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert torch.equal(forward(plain), forward(scaled))
    for one, other in zip(groups(plain, None), groups(scaled, {"base": ITSELF}), strict=True):
        assert {**one, "params": 0} == {**other, "params": 0}


def test_the_plan_tells_what_is_made_of_each_tensor() -> None:
    model = {
        **SHAPE,
        "init_std": 0.5,
        "init_scaled_residual": False,
        "mup": {"base": BASE, "embedding_multiplier": 3.0},
    }
    assert show_mup(mup_rows(tiny_config(model=model, optimizer={"weight_decay": 0.2}))) == [
        "muP           embedding: initial std 0.5, learning rate x 1, weight decay 0, forward pass x 3",
        "muP           norms: learning rate x 1, weight decay 0",
        "muP           attention.query, attention.key, attention.value, feed_forward.gate, feed_forward.up: m 3, "
        "initial std 0.289, learning rate x 0.333, weight decay 0.6",
        "muP           attention.output: m 2, initial std 0.354, learning rate x 0.5, weight decay 0.4",
        "muP           feed_forward.down: m 7, initial std 0.189, learning rate x 0.143, weight decay 1.4",
        "muP           head: m 3, initial std 0.5, learning rate x 1, weight decay 0.2, forward pass x 0.333",
        "muP           attention scores: forward pass x 0.707",
    ]
    tied = mup_rows(tiny_config(model={**model, "tied_embeddings": True}, optimizer={"weight_decay": 0.2}))
    assert tied[-2] == {
        "tensors": ["head"], "m": 3, "initial_std": 0.5, "learning_rate": 1, "weight_decay": 0, "multiplier": 1 / 3
    }  # fmt: skip
    assert mup_rows(tiny_config()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mup": {"base": {**BASE, "head_dim": None, "heads": 3}}},
            "mup.base: hidden_size 16 is not a multiple of heads 3",
        ),
        ({"mup": {"base": BASE, "zero_init_head": True}, "tied_embeddings": True}, "choose one of them"),
        ({"mup": {"base": BASE, "zero_init_query": True}, "qk_norm": True}, "mup.zero_init_query with qk_norm"),
        ({"mup": {"base": {**BASE, "kv_heads": 3}}}, "mup.base: heads 4 is not a multiple of kv_heads 3"),
        ({"mup": {"base": BASE, "output_multiplier": 0.0}}, "'mup.output_multiplier' = 0.0"),
        ({"mup": {"base": {"hidden_size": 16}}}, "'mup.base.heads' is missing"),
        ({"mup": {}}, "'mup.base' is missing"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        build_settings(ModelSettings, {**SHAPE, **changes}, "model")
    assert message in str(refusal.value)
