"""Parameter groups, and AdamW against its equations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from data_pipeline.errors import UserError
from data_pipeline.settings import build_settings
from pretrain.model import Decoder, ModelSettings, initialize_
from pretrain.model.norm import RMSNorm
from pretrain.optimizer import AdamWSettings, parameter_groups


def decoder(tied: bool = False, *linear: dict[str, Any]) -> Decoder:
    shape = {"hidden_size": 16, "layers": 2, "heads": 2, "intermediate_size": 24, "qk_norm": True}
    plain = {**shape, "tied_embeddings": tied, "linear": list(linear)}
    model = Decoder(build_settings(ModelSettings, plain, "test"), 30)
    initialize_(model, 1)
    return model


def groups(model: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    return parameter_groups(model.named_parameters(), AdamWSettings(**settings))


@pytest.mark.parametrize("tied", [False, True])
def test_norms_and_embeddings_are_not_decayed(tied: bool) -> None:
    model = decoder(tied)
    decayed, plain = groups(model, weight_decay=0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    exempt = [
        f"{owner}.{name}" if owner else name
        for owner, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if isinstance(module, RMSNorm | nn.Embedding)
    ]
    names = [name for name, _ in model.named_parameters()]
    assert plain["names"] == [name for name in names if name in exempt]
    assert decayed["names"] == [name for name in names if name not in exempt]
    assert len(plain["names"]) == 1 + 2 * 4 + 1
    assert ("head.weight" in decayed["names"]) is not tied
    for group in (decayed, plain):
        assert group["lr_scale"] == 1.0
        assert all(model.get_parameter(n) is p for n, p in zip(group["names"], group["params"], strict=True))


def test_factors_and_columns_are_decayed_as_any_weight() -> None:
    model = decoder(False, {"kind": "lost", "rank": 3})
    decayed, plain = groups(model, weight_decay=0.3)
    assert [name for name in plain["names"] if "norm" not in name] == ["embedding.weight"]
    inside = [name for name in decayed["names"] if name.startswith("blocks.0.attention.query.")]
    assert inside == [f"blocks.0.attention.query.{name}" for name in ("a", "b", "column_weight")]
    assert len(decayed["names"]) == 2 * 7 * 3 + 1


def test_all_are_decayed_when_asked_and_empty_groups_are_left_out() -> None:
    model = decoder()
    (only,) = groups(model, decay_norms_and_embeddings=True)
    assert only["weight_decay"] == 0.1
    assert only["names"] == [name for name, _ in model.named_parameters()]
    (norms,) = parameter_groups([("norm.weight", model.norm.weight)], AdamWSettings())
    assert norms["weight_decay"] == 0.0


@pytest.mark.parametrize("fused", [True, False])
def test_the_optimizer_is_adamw(fused: bool) -> None:
    """Three steps against the equations of arXiv 1711.05101, algorithm 2, with the decay multiplied by the rate."""
    settings = AdamWSettings(lr=0.01, betas=(0.8, 0.9), eps=0.05, weight_decay=0.5, fused=fused)
    weight, gain = (nn.Parameter(torch.tensor([1.0, -2.0, 3.0])) for _ in range(2))
    optimizer = settings.build(parameter_groups([("head.weight", weight), ("norm.weight", gain)], settings))
    assert optimizer.defaults["fused"] is (True if fused else None)
    assert [group["lr_scale"] for group in optimizer.param_groups] == [1.0, 1.0]
    for parameter, decay in ((weight, 0.5), (gain, 0.0)):
        expected = parameter.detach().double().tolist()
        mean, square = [0.0] * 3, [0.0] * 3
        for step in range(1, 4):
            gradient = [0.3 * step, -0.1, 0.02 / step]
            for i, g in enumerate(gradient):
                mean[i] = 0.8 * mean[i] + 0.2 * g
                square[i] = 0.9 * square[i] + 0.1 * g * g
                adam = mean[i] / (1 - 0.8**step) / (math.sqrt(square[i] / (1 - 0.9**step)) + 0.05)
                expected[i] -= 0.01 * (adam + decay * expected[i])
            parameter.grad = torch.tensor(gradient)
            optimizer.step()
        assert parameter.tolist() == pytest.approx(expected, rel=1e-5)
        parameter.grad = None


def test_where_the_fused_kernel_does_not_run_the_plain_one_is_taken() -> None:
    parameter = nn.Parameter(torch.empty(2, device="meta"))
    settings = AdamWSettings()
    assert settings.build(parameter_groups([("head.weight", parameter)], settings)).defaults["fused"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": (0.9, 1.0)}, "optimizer: betas [0.9, 1.0] must both be at least 0 and below 1"),
        ({"lr": 0.0}, "'lr' = 0.0: input should be greater than 0"),
        ({"lr": "3e-4"}, "'lr' = '3e-4': input should be a valid number"),
        ({"kind": "adam"}, "'kind' = 'adam': input should be 'adamw'; did you mean 'adamw'?"),
        ({"clip": 1.0}, "unknown key 'clip' (value 1.0); did you mean 'clip_norm'?"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        build_settings(AdamWSettings, settings, "optimizer")
    assert message in str(refusal.value)
