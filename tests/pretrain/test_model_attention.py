"""Attention, rotary positions and norms against explicit references."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from pretrain.model import ModelSettings, initialize_
from pretrain.model.attention import Attention, document_mask
from pretrain.model.feed_forward import FeedForward
from pretrain.model.norm import RMSNorm
from pretrain.model.rope import rotate, rotation

SHAPE = {"hidden_size": 32, "layers": 2, "heads": 4, "intermediate_size": 48}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def initialized(module: torch.nn.Module) -> torch.nn.Module:
    initialize_(module, 5)
    for name, parameter in module.named_parameters():
        if "norm" in name:  # gains of 1 would hide a gain that is left out
            parameter.data += 0.3 * random(*parameter.shape, seed=len(name))
        else:
            parameter.data *= 10.0  # scores far from uniform
    return module


def rotated_by_complex_numbers(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE as its paper has it: pairs of features as complex numbers times e^(i position frequency), in fp64."""
    half = x.shape[-1] // 2
    frequencies = torch.tensor([theta ** (-2 * i / (2 * half)) for i in range(half)], dtype=torch.float64)
    turn = torch.polar(torch.ones(half, dtype=torch.float64), positions.double()[..., None] * frequencies)
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn[:, :, None]
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


def explicit_attention(module: Attention, x: Tensor, positions: Tensor, documents: Tensor, theta: float) -> Tensor:
    """Attention by loops over rows, heads and tokens; the scores in fp64."""
    batch, length, _ = x.shape
    weight = {name: getattr(module, name).weight for name in ("query", "key", "value", "output")}
    query, key, value = ((x @ weight[n].T).unflatten(-1, (-1, module.head_dim)) for n in ("query", "key", "value"))
    if module.qk_norm:
        for gain, t in ((module.query_norm.weight, query), (module.key_norm.weight, key)):
            normed = t.flatten(2) if module.qk_norm == "all_heads" else t
            normed = gain * normed / (normed.square().mean(-1, keepdim=True) + module.query_norm.eps).sqrt()
            t.data = normed.view_as(t)
    query = rotated_by_complex_numbers(query, positions, theta)
    key = rotated_by_complex_numbers(key, positions, theta)
    heads, group = query.shape[2], query.shape[2] // key.shape[2]
    mixed = torch.zeros(batch, length, heads, module.head_dim)
    for row in range(batch):
        for head in range(heads):
            for token in range(length):
                seen = [u for u in range(token + 1) if documents[row, u] == documents[row, token]]
                keys, values = key[row, seen, head // group], value[row, seen, head // group]
                scores = (keys @ query[row, token, head]).double() / math.sqrt(module.head_dim)
                mixed[row, token, head] = scores.softmax(0).float() @ values
    return mixed.flatten(2) @ weight["output"].T


@pytest.mark.parametrize("single_document", [True, False], ids=["causal", "documents"])
@pytest.mark.parametrize("qk_norm", [False, True, "all_heads"])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(4, None), (2, 16), (1, None)])
@torch.no_grad()
def test_attention_equals_explicit_loops(
    kv_heads: int, head_dim: int | None, qk_norm: bool | Literal["all_heads"], single_document: bool
) -> None:
    settings = ModelSettings(**SHAPE, kv_heads=kv_heads, head_dim=head_dim, qk_norm=qk_norm)
    module = initialized(Attention("blocks.0.attention", settings))
    x = random(2, 9, 32)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1], list(range(9))])
    documents = torch.tensor([[4, 4, 4, 5, 5, 5, 5, 6, 6], [7] * 9])
    if single_document:
        documents = torch.zeros_like(documents)
    by = rotation(positions, module.head_dim, settings.rope_theta, x.dtype)
    mask = None if single_document else document_mask(documents, x.dtype)
    expected = explicit_attention(module, x, positions, documents, settings.rope_theta)
    torch.testing.assert_close(module(x, by, mask), expected, rtol=1e-5, atol=1e-5)


def test_rotation_angles_are_fp32_whatever_the_dtype_of_the_model() -> None:
    positions = torch.tensor([[0, 1, 4095, 100_000]])
    x = random(1, 4, 2, 16)
    expected = rotated_by_complex_numbers(x, positions, 500_000.0)
    torch.testing.assert_close(rotate(x, rotation(positions, 16, 500_000.0, x.dtype)), expected, rtol=0, atol=0.03)
    fine = rotation(positions, 16, 500_000.0, torch.float32)
    coarse = rotation(positions, 16, 500_000.0, torch.bfloat16)
    assert torch.equal(coarse.cosine, fine.cosine.bfloat16())
    assert torch.equal(coarse.sine, fine.sine.bfloat16())


def test_scores_depend_on_the_distance_alone() -> None:
    query, key = random(1, 1, 1, 8, seed=1), random(1, 1, 1, 8, seed=2)

    def score(query_position: int, key_position: int) -> float:
        by_query, by_key = (
            rotation(torch.tensor([[p]]), 8, 100.0, torch.float32) for p in (query_position, key_position)
        )
        return float((rotate(query, by_query) * rotate(key, by_key)).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-2)


def test_document_mask_is_causal_within_documents() -> None:
    mask = document_mask(torch.tensor([[1, 1, 2, 2, 2]]), torch.bfloat16)
    assert mask.shape == (1, 1, 5, 5)
    assert mask.dtype == torch.bfloat16
    assert mask[0, 0].eq(0).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert mask[mask != 0].eq(float("-inf")).all()


def test_rms_norm_computes_in_fp32_and_keeps_the_dtype() -> None:
    norm = initialized(RMSNorm(64, 1e-5))
    x = 100.0 * random(3, 64)
    expected = norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), expected)
    norm.bfloat16()
    x = x.bfloat16()
    exact = norm.weight.float() * x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), exact.bfloat16(), rtol=0, atol=0)


@torch.no_grad()
def test_feed_forward_is_swiglu() -> None:
    module = initialized(FeedForward("blocks.0.feed_forward", ModelSettings(**SHAPE)))
    x = random(2, 3, 32)
    gate, up = x @ module.gate.weight.T, x @ module.up.weight.T
    torch.testing.assert_close(module(x), (gate / (1 + torch.exp(-gate)) * up) @ module.down.weight.T)
