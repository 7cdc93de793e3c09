"""How experts are chosen: closed forms, bounds, and that no split of a batch and no later token changes anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import UserError
from pretrain.model.experts.entropy import EntropySettings, tsallis_entropy
from pretrain.model.experts.layer import MixtureOfExperts
from pretrain.model.experts.noise import mixed, noise_keys, uniform
from pretrain.model.experts.statistics import Routing, routing_width

from .test_experts import made, model_settings

ROWS, LENGTH = 3, 12


def tokens(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, LENGTH, 16, generator=torch.Generator().manual_seed(8))


def valid_tokens() -> Tensor:
    """The first row whole, the second ragged, the third a hole."""
    counted = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    counted[1, 7:] = False
    counted[2] = False
    return counted


def routing(layer: MixtureOfExperts, x: Tensor, counted: Tensor | None) -> Routing:
    with torch.no_grad():
        return Routing(layer(x, counted, None)[1])


def scores_of(layer: MixtureOfExperts, x: Tensor) -> Tensor:
    return layer.router.scores(layer.router(x, None)).scores.detach()


VARIANTS: dict[str, dict[str, Any]] = {
    "top_k": {},
    "sigmoid": {"score": "sigmoid"},
    "groups": {"groups": {"number": 3, "kept": 1}},
    "capacity": {"capacity": {"factor": 0.8}},
    "capacity by score": {"capacity": {"factor": 0.8, "priority": "score"}},
    "expert_choice": {"routing": "expert_choice", "normalised": False},
    "hybrid": {"routing": {"kind": "hybrid", "threshold": 1.5}, "entropy": {}},
    "jitter": {"jitter": 0.2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_split_of_a_batch_changes_anything(variant: str) -> None:
    """Row by row as all together: output, sums and gradients."""
    layer, x, counted = made(torch.float32, **VARIANTS[variant]), tokens().requires_grad_(), valid_tokens()
    keys = noise_keys(1, torch.arange(ROWS))

    def passed(parts: list[slice]) -> list[Tensor]:
        found = [layer(x[rows], counted[rows], keys[rows], True) for rows in parts]
        both = [torch.cat(each) for each in zip(*found, strict=True)]
        # each row of the outputs and each sum has another weight
        value = sum((each * torch.linspace(-1, 1, each.numel()).view_as(each)).sum() for each in both)
        return [*both, *torch.autograd.grad(value, [x, *layer.parameters()])]

    for whole, split in zip(passed([slice(0, ROWS)]), passed([slice(i, i + 1) for i in range(ROWS)]), strict=True):
        torch.testing.assert_close(whole, split, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_nothing_in_an_evaluation(variant: str) -> None:
    """A sequence of 7 tokens by itself as followed by 5 that don't count, whatever these are."""
    layer, x, counted = made(torch.float32, **VARIANTS[variant]), tokens()[1:2], valid_tokens()[1:2]
    alone, padded = layer(x[:, :7], counted[:, :7], None), layer(x, counted, None)
    torch.testing.assert_close(padded[0][:, :7], alone[0])
    torch.testing.assert_close(padded[1], alone[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_causal_or_known_not_to_be(variant: str) -> None:
    """What a token's experts depend on: another last token changes nothing before it, where that is promised."""
    layer, x = made(torch.float32, **VARIANTS[variant]), tokens(1)
    counted = torch.ones(1, LENGTH, dtype=torch.bool)
    changed = x.clone()
    changed[0, -1] = 5 * x[0, 3]
    before, after = (layer(each, counted, None, True)[0][0, :-1] for each in (x, changed))
    is_causal = layer.settings.routing.causal and variant != "capacity by score"
    assert torch.allclose(before, after, atol=1e-6) == is_causal


def test_what_does_not_count_is_not_counted() -> None:
    layer, x, counted = made(torch.float32, entropy={}), tokens(), valid_tokens()
    found = routing(layer, x, counted)
    assert found.packed.shape == (ROWS, routing_width(6))
    assert found.tokens.tolist() == [12, 7, 0]
    assert found.choices.sum(dim=1).tolist() == found.loads.sum(dim=1).tolist() == [24, 14, 0]
    assert torch.equal(found.packed[2], torch.zeros(routing_width(6)))
    garbage = torch.where(counted[..., None], x, 100.0)
    assert torch.equal(routing(layer, garbage, counted).packed, found.packed)


def test_the_sums() -> None:
    layer, x, counted = made(torch.float32, entropy={"order": 2.0}), tokens(), valid_tokens()
    found, logits = routing(layer, x, counted), layer.router(x, None).detach()
    p = logits.softmax(-1)
    for row in range(ROWS):
        chosen = p[row][counted[row]]
        torch.testing.assert_close(found.scores[row], chosen.sum(0))
        best = torch.zeros_like(chosen).scatter(1, chosen.topk(2).indices, 1.0)
        assert torch.equal(found.choices[row], best.sum(0))
        z = logits[row][counted[row]].logsumexp(-1)
        torch.testing.assert_close(found.squared_log_partition[row], z.square().sum())
        torch.testing.assert_close(found.shannon[row], -(chosen * chosen.log()).sum())
        torch.testing.assert_close(found.entropy[row], (1 - chosen.square().sum(-1)).sum())
        assert found.dropped[row] == 0


def test_gradients_of_the_sums_reach_the_router_alone() -> None:
    layer, x = made(torch.float32, entropy={}), tokens()
    sums = Routing(layer(x, valid_tokens(), None)[1])
    for differentiable in (sums.scores[:, 0], sums.squared_log_partition, sums.entropy):
        (gradient,) = torch.autograd.grad(differentiable.sum(), layer.router.weight, retain_graph=True)
        assert gradient.abs().max() > 1e-3
    for counts in (sums.choices, sums.loads, sums.tokens, sums.shannon, sums.dropped):
        (gradient,) = torch.autograd.grad(counts.sum(), layer.router.weight, retain_graph=True)
        assert gradient.abs().max() == 0


def test_the_bias_chooses_and_does_not_weigh() -> None:
    layer, x = made(torch.float32, selection_bias=True), tokens()
    plain = routing(layer, x, None)
    with torch.no_grad():
        layer.router.selection_bias[3] = 10.0
    biased = routing(layer, x, None)
    assert biased.loads[:, 3].tolist() == [LENGTH] * ROWS
    assert torch.equal(biased.choices, plain.choices), "f of the balancing losses is without bias"
    assert torch.equal(biased.scores, plain.scores)
    choice = layer.settings.routing.choose(
        layer.router.scores(layer.router(x, None)), layer.settings, torch.ones(ROWS, LENGTH, dtype=torch.bool)
    )
    assert torch.equal(choice.weights, scores_of(layer, x).gather(-1, choice.experts))


def test_the_bias_stays_in_fp32() -> None:
    layer = made(torch.float32, selection_bias=True)
    with torch.no_grad():
        layer.router.selection_bias.fill_(1.0 + 2.0**-20)
    layer = layer.bfloat16()
    assert layer.router.weight.dtype == torch.bfloat16
    assert layer.router.selection_bias.tolist() == [1.0 + 2.0**-20] * 6
    assert "router.selection_bias" in layer.state_dict()


def test_groups_bound_a_token_to_the_best_of_them() -> None:
    layer, x = made(torch.float32, groups={"number": 3, "kept": 1, "best": 1}), tokens()
    p = scores_of(layer, x)
    group = p.argmax(-1) // 2
    expected = torch.zeros(ROWS, 6).index_put_(
        (torch.arange(ROWS)[:, None].expand(-1, LENGTH), 2 * group), torch.ones(()), accumulate=True
    )
    found = routing(layer, x, None).loads
    assert torch.equal(found[:, 0::2], expected[:, 0::2])
    assert torch.equal(found[:, 1::2], expected[:, 0::2])


def test_capacity_drops_the_last_and_counts_them() -> None:
    """Everything to expert 0 and 1: of 12 tokens each keeps ⌈0.8 * 2 * 12 / 6⌉ = 4; an evaluation keeps all."""
    layer, x = made(torch.float32, capacity={"factor": 0.8}), tokens(2)
    x[..., 0] = 1.0
    with torch.no_grad():
        layer.router.weight[:, 0] = torch.tensor([60.0, 50.0, 0, 0, 0, 0])
    counted = torch.ones(2, LENGTH, dtype=torch.bool)
    counted[1, :3] = False
    output, sums = layer(x, counted, None, True)
    found = Routing(sums)
    assert found.loads[:, :2].tolist() == [[12, 12], [9, 9]]
    assert found.dropped.tolist() == [2 * 8, 2 * 5]
    whole = layer(x, None, None)[0]
    assert torch.equal(output[0, 4:], torch.zeros(8, 16))
    torch.testing.assert_close(output[0, :4], whole[0, :4])
    torch.testing.assert_close(output[1, :7], whole[1, :7])  # three that take no room, and the first four that do
    assert torch.equal(output[1, 7:], torch.zeros(5, 16))


def test_a_slot_that_is_left_weighs_what_it_weighed_with_the_dropped_one() -> None:
    """Expert 0 is full after 4 tokens: what it would have added is missing, the other slots' weights don't grow."""
    layer, x = made(torch.float32, score="sigmoid", capacity={"factor": 0.8}), tokens(1)
    x[..., 0] = 1.0
    with torch.no_grad():
        layer.router.weight[0] = 0.0
        layer.router.weight[0, 0] = 9.0
    weights, experts = scores_of(layer, x)[0].topk(2)
    assert (experts[:, 0] == 0).all()
    taken = [int((experts[:t, 1] == experts[t, 1]).sum()) for t in range(LENGTH)]
    one_left = [t for t in range(4, LENGTH) if taken[t] < 4]
    assert one_left
    output = layer(x, torch.ones(1, LENGTH, dtype=torch.bool), None, True)[0][0]
    for t in one_left:
        ends = (torch.arange(6) >= experts[t, 1]).int()
        expected = weights[t, 1] / weights[t].sum() * layer.experts(x[0, t : t + 1], ends)[0]
        torch.testing.assert_close(output[t], expected)


def test_a_dropped_sequence_leaves_neither_sums_nor_gradient() -> None:
    packed = torch.ones(1, 2, routing_width(6), dtype=torch.float64)
    packed[0, 1] = float("nan")
    packed.requires_grad_()
    left = Routing(packed).without(torch.tensor([False, True])).packed
    (gradient,) = torch.autograd.grad(left.square().sum(), packed)
    assert [left[0].sum(-1).tolist(), gradient[0].sum(-1).tolist()] == [[23.0, 0.0], [46.0, 0.0]]


def test_capacity_by_score_keeps_the_largest_weights() -> None:
    layer, x = made(torch.float32, top_k=1, normalised=False, capacity={"factor": 0.5, "priority": "score"}), tokens(1)
    counted = torch.ones(1, LENGTH, dtype=torch.bool)
    output, sums = layer(x, counted, None, True)
    p = scores_of(layer, x)[0]
    best, expert = p.max(-1)
    kept = [t for t in range(LENGTH) if best[t] == best[expert == expert[t]].max()]  # room is ⌈0.5 * 12 / 6⌉ = 1
    assert output[0].abs().sum(-1).nonzero().flatten().tolist() == kept
    assert Routing(sums).dropped.tolist() == [LENGTH - len(kept)]


def test_expert_choice_is_balanced() -> None:
    layer, x, counted = made(torch.float32, **VARIANTS["expert_choice"]), tokens(), valid_tokens()
    assert routing(layer, x, counted).loads.tolist() == [[4.0] * 6, [3.0] * 6, [0.0] * 6]  # ⌈2 * 12 / 6⌉, ⌈2 * 7 / 6⌉
    p = scores_of(layer, x)
    taken = layer.settings.routing.choose(layer.router.scores(layer.router(x, None)), layer.settings, counted).kept
    assert taken is not None
    for expert in range(6):
        column = p[0, :, expert]
        assert taken[0, :, expert].nonzero().flatten().tolist() == column.topk(4).indices.sort().values.tolist()


def test_tsallis_entropy_golden() -> None:
    """algorithms.md, section 8.2."""
    uniform_p, one_hot = torch.full((8,), 0.125, dtype=torch.float64), torch.eye(8, dtype=torch.float64)[0]
    for order, value in ((1.1, 1.877476), (1.4, 1.411812), (2.0, 0.875), (1.0, 2.0794415)):
        settings = EntropySettings(order=order)
        assert tsallis_entropy(uniform_p, settings).item() == pytest.approx(value, abs=1e-6)
        assert tsallis_entropy(one_hot, settings).item() == pytest.approx(0.0, abs=1e-9)
        assert tsallis_entropy(uniform_p, EntropySettings(order=order, normalised=True)).item() == pytest.approx(1.0)
    near = tsallis_entropy(uniform_p, EntropySettings(order=1.0 + 1e-6)).item()
    assert near == pytest.approx(tsallis_entropy(uniform_p, EntropySettings(order=1.0)).item(), abs=1e-5)


def weights_of(x: Tensor, **routing_settings: Any) -> Tensor:
    """[T, E] weights of the experts under hybrid routing."""
    entropy = routing_settings.pop("entropy", {})
    layer = made(torch.float32, routing={"kind": "hybrid", **routing_settings}, entropy=entropy)
    choice = layer.settings.routing.choose(
        layer.router.scores(layer.router(x, None)), layer.settings, torch.ones(x.shape[:2], dtype=torch.bool)
    )
    return torch.zeros(1, LENGTH, 6).scatter(-1, choice.experts, layer._weights(choice, choice))[0].detach()


def test_hybrid_routing() -> None:
    x = tokens(1)
    p = scores_of(made(torch.float32), x)[0]
    soft = tsallis_entropy(p, EntropySettings()) > 1.2
    assert 2 <= int(soft.sum()) <= LENGTH - 2
    weights = weights_of(x, threshold=1.2, top_p=0.75)
    torch.testing.assert_close(weights.sum(-1), torch.ones(LENGTH))
    torch.testing.assert_close(weights[soft], p[soft])
    for token in (~soft).nonzero().flatten().tolist():
        order = p[token].argsort(descending=True)
        number = max(2, int((p[token][order].cumsum(0) < 0.75).sum()) + 1)  # the one that crosses is taken
        expected = torch.zeros(6).index_copy(0, order[:number], p[token][order[:number]])
        torch.testing.assert_close(weights[token], expected / expected.sum())
    assert (weights_of(x, threshold=10.0, top_p=1e-9) > 0).sum(-1).tolist() == [2] * LENGTH
    torch.testing.assert_close(weights_of(x, threshold=10.0, top_p=1.0), p)
    both = [weights_of(x, threshold=0.9, entropy=entropy) for entropy in ({}, {"order": 1.4, "normalised": True})]
    assert not torch.equal(*both), "the two readings of the threshold are different regimes"


def test_noise_is_a_function_of_its_place() -> None:
    keys = noise_keys(7, torch.tensor([0, 1, 2**40]))
    noise = uniform(keys, 3, 50, 64)
    assert noise.shape == (3, 50, 64)
    assert (noise.min() >= 0) & (noise.max() < 1)
    assert noise.mean().item() == pytest.approx(0.5, abs=0.01)
    assert noise.var().item() == pytest.approx(1 / 12, abs=0.003)
    correlation = torch.corrcoef(torch.stack([noise.flatten()[:-1], noise.flatten()[1:]]))[0, 1]
    assert abs(correlation.item()) < 0.05
    assert torch.equal(uniform(keys[2:], 3, 50, 64)[0], noise[2])
    assert torch.equal(uniform(keys, 3, 20, 64), noise[:, :20])
    for other in (uniform(keys, 4, 50, 64), uniform(noise_keys(8, torch.tensor([0, 1, 2**40])), 3, 50, 64)):
        assert (other == noise).float().mean() < 1e-3
    assert len(noise.unique()) > 0.99 * noise.numel() * (1 - noise.numel() / 2**25)
    assert noise_keys(7, torch.tensor([5])).item() == 2383727622810433563, "pinned: a resume must find the same noise"
    words = torch.tensor([0, 1, -1, 2**62 + 12345])
    assert [word % 2**64 for word in mixed(words).tolist()] == [splitmix64(word % 2**64) for word in words.tolist()]


def splitmix64(x: int) -> int:
    """The finaliser in Python's unbounded integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_jitter_is_of_training_and_of_the_router_only() -> None:
    layer, x = made(torch.float32, jitter=0.3), tokens()
    assert torch.equal(layer.router(x, None), made(torch.float32).router(x, None))
    keys = noise_keys(1, torch.arange(ROWS))
    noise = 1.0 + 0.3 * (2.0 * uniform(keys, 1, LENGTH, 16) - 1.0)
    torch.testing.assert_close(layer.router(x, keys), layer.router(x * noise, None), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("experts", "told"),
    [
        ({"top_k": 7}, "top_k 7 is more than number 6"),
        ({"top_k": 1}, "set normalised=false"),
        ({"groups": {"number": 4, "kept": 1}}, "number 6 is not a multiple of groups.number 4"),
        ({"groups": {"number": 3, "kept": 3}}, "bounds nothing"),
        ({"groups": {"number": 6, "kept": 1}}, "groups.kept 1 have 1 experts, fewer than top_k 2"),
        ({"routing": "expert_choice"}, "set normalised=false"),
        ({"routing": "expert_choice", "normalised": False, "capacity": {"factor": 1.0}}, "neither groups nor capacity"),
        ({"routing": "expert_choice", "normalised": False, "selection_bias": True}, "selection_bias has no meaning"),
        ({"routing": "hybrid"}, "needs entropy"),
        ({"routing": "hybrid", "entropy": {}, "score": "sigmoid"}, "set score=softmax"),
        ({"routing": "hybrid", "entropy": {}, "groups": {"number": 3, "kept": 2}}, "neither groups nor capacity"),
        ({"routing": "topk"}, "top_k"),
        ({"dense_first": 2}, "leaves none of the 2 layers for experts"),
    ],
)
def test_refusals(experts: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        model_settings(experts)
    assert told in str(caught.value)


def test_which_blocks_have_experts() -> None:
    assert model_settings({}).expert_layers == [0, 1]
    assert model_settings({"dense_first": 1}, layers=6).expert_layers == [1, 2, 3, 4, 5]
    assert model_settings({"dense_first": 1, "every": 2}, layers=6).expert_layers == [1, 3, 5]
