"""The layer with experts against a plain loop over experts, and against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.settings import build_settings
from pretrain.model import ModelSettings, initialize_
from pretrain.model.experts import grouped
from pretrain.model.experts.layer import MixtureOfExperts
from pretrain.model.experts.statistics import Routing

SHAPE = {"hidden_size": 16, "layers": 2, "heads": 2, "intermediate_size": 24, "init_std": 0.3}
EXPERTS = {"number": 6, "top_k": 2, "intermediate_size": 8}


def model_settings(experts: dict[str, Any], **changes: Any) -> ModelSettings:
    return build_settings(ModelSettings, {**SHAPE, **changes, "experts": {**EXPERTS, **experts}}, "test")


def made(dtype: torch.dtype = torch.float64, seed: int = 3, **experts: Any) -> MixtureOfExperts:
    layer = MixtureOfExperts("blocks.1.feed_forward", 1, model_settings(experts))
    initialize_(layer, seed)
    return layer.to(dtype)


def inputs(batch: int = 3, length: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def by_loop(layer: MixtureOfExperts, x: Tensor) -> Tensor:
    """Each token by itself, each of its experts by itself, in the precision of the weights; top-k routing only."""
    settings, experts = layer.settings, layer.experts
    rows = []
    for token in x.flatten(0, 1):
        logits = layer.router.weight.float() @ token.float()
        scores = logits.softmax(0) if settings.score == "softmax" else logits.sigmoid()
        chosen = scores.argsort(descending=True)[: settings.top_k]
        weights = scores[chosen] / (scores[chosen].sum() if settings.normalised else 1.0) * settings.scaling
        row = torch.zeros_like(token)
        for expert, weight in zip(chosen.tolist(), weights, strict=True):
            inner = F.silu(experts.gate[expert] @ token) * (experts.up[expert] @ token)
            row = row + weight.to(token.dtype) * (experts.down[expert] @ inner)
        if settings.shared:
            row = row + layer.shared(token)
        rows.append(row)
    return torch.stack(rows).view_as(x)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one": {"top_k": 1, "normalised": False},
    "all": {"top_k": 6},
    "raw weights": {"normalised": False, "scaling": 2.5},
    "sigmoid": {"score": "sigmoid", "scaling": 1.5},
    "shared": {"shared": 2},
    "a single expert": {"number": 1, "top_k": 1, "normalised": False},
}


def both(layer: MixtureOfExperts, x: Tensor) -> list[dict[str, Tensor]]:
    """Output and every gradient: of the layer, and of the loop."""
    found = []
    for forward in (lambda: layer(x, None, None)[0], lambda: by_loop(layer, x)):
        layer.zero_grad()
        x.grad = None
        output = forward()
        (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
        gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
        found.append({"output": output.detach(), "x": x.grad.clone(), **gradients})
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_dropless_is_a_loop_over_experts(case: str, dtype: torch.dtype) -> None:
    layer = made(dtype, **CASES[case])
    ours, theirs = both(layer, inputs(dtype=dtype))
    assert ours.keys() == theirs.keys() == {"output", "x", *dict(layer.named_parameters())}
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-6, msg=name)
    assert theirs["router.weight"].abs().max() > 1e-3 or case == "a single expert"


def steered(bias_of: dict[int, float], **experts: Any) -> MixtureOfExperts:
    """A layer whose router likes these experts whatever the token: the inputs' first feature is 1."""
    layer = made(**experts)
    with torch.no_grad():
        layer.router.weight[:, 0] = 0.0
        for expert, value in bias_of.items():
            layer.router.weight[expert, 0] = value
    return layer


@pytest.mark.parametrize(
    ("liked", "top_k", "loads"),
    [
        ({4: 60.0}, 2, {4: 21}),
        ({4: -60.0, 1: -60.0}, 2, {4: 0, 1: 0}),
        ({0: 60.0, 5: 50.0}, 2, {0: 21, 5: 21, 1: 0, 4: 0}),
        ({3: 60.0}, 1, {0: 0, 1: 0, 2: 0, 3: 21, 4: 0, 5: 0}),
    ],
)
def test_idle_and_crowded_experts(liked: dict[int, float], top_k: int, loads: dict[int, int]) -> None:
    layer, x = steered(liked, top_k=top_k, normalised=top_k > 1), inputs()
    with torch.no_grad():
        x[..., 0] = 1.0
    ours, theirs = both(layer, x)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-6, msg=name)
    found = Routing(layer(x, None, None)[1]).loads.sum(dim=0)
    assert {expert: int(found[expert]) for expert in loads} == loads
    for expert, load in loads.items():
        assert (ours["experts.gate"][expert].abs().max() > 0) == (load > 0)


def test_scores_are_made_in_fp32() -> None:
    layer, x = made(torch.bfloat16), inputs(dtype=torch.bfloat16)
    logits = layer.router(x, None)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x.float() @ layer.router.weight.float().T, rtol=0, atol=0)
    output, sums = layer(x, None, None)
    assert (output.dtype, sums.dtype) == (torch.bfloat16, torch.float32)


def test_experts_are_drawn_by_seed_and_number() -> None:
    few, many = made(number=4), made(number=6)
    assert torch.equal(few.experts.gate, many.experts.gate[:4])
    assert torch.equal(few.experts.down, many.experts.down[:4])
    assert not torch.equal(few.experts.gate, made(seed=4, number=4).experts.gate)
    flat = [matrix.flatten()[0].item() for name in ("gate", "up", "down") for matrix in getattr(many.experts, name)]
    assert len(set(flat)) == 18
    assert many.experts.gate.std().item() == pytest.approx(0.3, rel=0.05)
    assert many.experts.down.std().item() == pytest.approx(0.3 / 2, rel=0.05)  # sqrt(2 layers)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "deepseek_v3"])
def test_transformers_computes_the_same(family: str) -> None:
    """Router and experts of an independent implementation, with our weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_experts_per_tok": 2}
    if family == "mixtral":
        config = transformers.MixtralConfig(**shape, intermediate_size=8, num_local_experts=6)
        theirs = transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock(config)
        layer = made(torch.float32)
    elif family == "olmoe":
        config = transformers.OlmoeConfig(**shape, intermediate_size=8, num_experts=6, norm_topk_prob=False)
        theirs = transformers.models.olmoe.modeling_olmoe.OlmoeSparseMoeBlock(config)
        layer = made(torch.float32, normalised=False)
    else:
        config = transformers.DeepseekV3Config(
            **shape, moe_intermediate_size=8, n_routed_experts=6, n_shared_experts=2, n_group=3, topk_group=2,
            routed_scaling_factor=2.5,
        )  # fmt: skip
        theirs = transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3MoE(config)
        layer = made(
            torch.float32, score="sigmoid", shared=2, scaling=2.5, groups={"number": 3, "kept": 2}, selection_bias=True
        )
        with torch.no_grad():
            layer.router.selection_bias.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0, -0.3, 0.2]))
            theirs.gate.e_score_correction_bias.copy_(layer.router.selection_bias)
            for ours, name in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
                getattr(theirs.shared_experts, name).weight.copy_(getattr(layer.shared, ours).weight)
    with torch.no_grad():
        theirs.gate.weight.copy_(layer.router.weight)
        theirs.experts.gate_up_proj.copy_(torch.cat([layer.experts.gate, layer.experts.up], dim=1))
        theirs.experts.down_proj.copy_(layer.experts.down)
        x = inputs(dtype=torch.float32)
        torch.testing.assert_close(layer(x, None, None)[0], theirs.eval()(x.clone()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("filled", [40, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_grouped_product_is_the_loop(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, filled: int) -> None:
    """What a GPU would run, by the same calls on a CPU: an empty group, and rows behind the last one."""
    random = torch.Generator().manual_seed(2)
    ends = torch.tensor([9, 9, 30, filled], dtype=torch.int32)
    found = []
    for has_kernel in (False, True):
        monkeypatch.setattr(grouped, "_has_kernel", lambda *_, answer=has_kernel: answer)
        x = torch.randn(40, 16, generator=random.manual_seed(2)).to(dtype).requires_grad_()
        weight = torch.randn(4, 24, 16, generator=random).to(dtype).requires_grad_()
        output = grouped.grouped_linear(x, weight, ends)
        output.backward(torch.randn(40, 24, generator=random).to(dtype))
        assert x.grad is not None
        assert weight.grad is not None
        found.append((output.detach(), x.grad, weight.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert theirs.abs().max() > 1
    assert found[1][0][filled:].abs().sum() == found[1][1][filled:].abs().sum() == found[1][2][1].abs().sum() == 0
