"""What Muon and GaLore do to a matrix: closed forms, torch's own, the plain loops; and when they refuse to."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from data_pipeline.errors import HeadraceError
from pretrain.distributed import Distributed
from pretrain.optimizer import AdamWSettings, OptimizerSettings, parameter_groups
from pretrain.optimizer.base import AdamSettings
from pretrain.optimizer.kinds.galore import GaLoreSettings, leading_vectors
from pretrain.optimizer.kinds.muon import MuonSettings, orthogonalize
from pretrain.optimizer.matrix_wise import MatrixWise

from .methods.optimizers import plain_galore, plain_orthogonalize
from .steps import tiny_config


def groups_of(settings: OptimizerSettings, **shapes: tuple[int, ...]) -> list[dict[str, Any]]:
    named = [
        (name.replace("_", "."), nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(number))))
        for number, (name, shape) in enumerate(shapes.items())
    ]
    return parameter_groups(named, settings)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (20, 20), (64, 3)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    found = orthogonalize(matrices, 5)
    for one, of_three in zip(matrices, found, strict=True):
        left, _, right = torch.linalg.svd(one, full_matrices=False)
        values = torch.linalg.svdvals(of_three)
        assert values.min() > 0.6, shape
        assert values.max() < 1.21, shape
        # the same singular vectors: what is left of U and V is diagonal
        core = left.mT @ of_three @ right.mT
        assert (core - core.diagonal().diag()).abs().max() < 1e-4
        assert (plain_orthogonalize(one, 5) - of_three).norm() < 1e-5 * of_three.norm()
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 6), 5), torch.zeros(1, 4, 6))


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_that_of_torch(adjust_lr: str, nesterov: bool) -> None:
    """torch.optim.Muon, which iterates in bf16: five steps, two matrices."""
    settings = MuonSettings(adjust_lr=adjust_lr, nesterov=nesterov, iterate_in="bf16", weight_decay=0.3)
    groups = groups_of(settings, blocks_0_a_weight=(24, 16), blocks_0_b_weight=(16, 24))
    twins = [nn.Parameter(parameter.detach().clone()) for parameter in groups[0]["params"]]
    initial = [twin.detach().clone() for twin in twins]
    theirs = torch.optim.Muon(twins, lr=0.02, weight_decay=0.3, nesterov=nesterov, adjust_lr_fn=adjust_lr)
    ours = settings.build(groups)
    for group in ours.param_groups:
        group["lr"] = 0.02
    random = torch.Generator().manual_seed(5)
    for _ in range(5):
        for parameter, twin in zip(groups[0]["params"], twins, strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=random)
            twin.grad = parameter.grad.clone()
        ours.step()
        theirs.step()
    for parameter, twin, start in zip(groups[0]["params"], twins, initial, strict=True):
        assert (parameter - twin).norm() < 1e-3 * (twin - start).norm()


def test_muons_other_parameters_have_adamw_and_a_rate_of_their_own() -> None:
    settings = MuonSettings(lr=0.02, adam_lr=0.005, weight_decay=0.1)
    groups = groups_of(settings, blocks_0_a_weight=(4, 4), blocks_0_a_values=(9,), head_weight=(6, 4), norm_weight=(4,))
    ours = settings.build(groups)
    told = {name: (group["matrix"], group["lr_scale"]) for group in ours.param_groups for name in group["names"]}
    assert told == {
        "blocks.0.a.weight": (True, 1.0),
        "blocks.0.a.values": (False, 0.25),
        "head.weight": (False, 0.25),
        "norm.weight": (False, 0.25),
    }
    others = [(group["names"], group["params"]) for group in groups if not group["matrix"]]
    twins = [nn.Parameter(parameter.detach().clone()) for _, parameters in others for parameter in parameters]
    adamw = AdamWSettings(weight_decay=0.1)
    names = [name for group, _ in others for name in group]
    theirs = adamw.build(parameter_groups(zip(names, twins, strict=True), adamw))
    for group in (*ours.param_groups, *theirs.param_groups):
        group["lr"] = 0.005
    for _ in range(3):
        for parameter, twin in zip([p for _, parameters in others for p in parameters], twins, strict=True):
            parameter.grad = torch.full_like(parameter, 0.3)
            twin.grad = parameter.grad.clone()
        ours.step()
        theirs.step()
    for parameter, twin in zip([p for _, parameters in others for p in parameters], twins, strict=True):
        assert torch.equal(parameter, twin)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_leading_vectors_hold_most_of_a_gradient(shape: tuple[int, int]) -> None:
    """Eckart-Young: what the projection onto them leaves has the other singular values."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    vectors = leading_vectors(gradient, 3)
    assert vectors.shape == (min(shape), 3)
    assert vectors.untyped_storage().nbytes() == 4 * vectors.numel(), "the other vectors are kept in memory"
    assert torch.allclose(vectors.mT @ vectors, torch.eye(3), atol=1e-5)
    kept = gradient @ vectors @ vectors.mT if shape[0] >= shape[1] else vectors @ vectors.mT @ gradient
    values = torch.linalg.svdvals(gradient)
    assert float((gradient - kept).square().sum()) == pytest.approx(float(values[3:].square().sum()), rel=1e-4)
    assert leading_vectors(gradient * float("nan"), 3).isnan().all()


def test_galore_looks_again_every_gap_steps_and_keeps_its_moments() -> None:
    settings = GaLoreSettings(rank=2, gap=2, scale=0.5)
    groups = groups_of(settings, blocks_0_attention_query_weight=(6, 4))
    (weight,) = groups[0]["params"]
    ours = settings.build(groups)
    seen = []
    for step in range(4):
        weight.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        before = weight.detach().clone()
        ours.step()
        state = ours.state[weight]["matrices"]["blocks.0.attention.query.weight"]
        seen.append((state["basis"].clone(), state["mean"].clone(), weight.grad @ state["basis"]))
        assert torch.linalg.matrix_rank(weight.detach() - before, rtol=1e-4) == 2
    bases = [basis for basis, _, _ in seen]
    assert torch.equal(bases[0], bases[1])
    assert torch.equal(bases[2], bases[3])
    assert not torch.equal(bases[1], bases[2])
    for (_, before, _), (_, mean, projected) in itertools.pairwise(seen):
        assert torch.allclose(mean, 0.9 * before + 0.1 * projected, atol=1e-6)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
def test_galore_is_the_plain_loop(shape: tuple[int, int]) -> None:
    """Tall, wide and square, across a new decomposition, with decay."""
    config = tiny_config(optimizer={"kind": "galore", "rank": 3, "gap": 2, "scale": 0.5, "weight_decay": 0.1})
    groups = groups_of(config.optimizer, blocks_0_attention_query_weight=shape)
    (weight,), (name,) = groups[0]["params"], groups[0]["names"]
    ours = config.optimizer.build(groups)
    master = weight.detach().clone()
    plain = plain_galore({name: master}, config)
    for step in range(4):
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        master.grad = weight.grad.clone()
        groups[0]["lr"] = 0.01
        ours.step()
        plain(0.01)
        torch.testing.assert_close(weight.detach(), master, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [MuonSettings(), GaLoreSettings(rank=2, modules=("*",))])
def test_experts_are_matrices_and_routers_embedding_and_head_are_none(settings: AdamSettings) -> None:
    shapes = {"embedding.weight": (64, 8), "head.weight": (64, 8), "blocks.0.attention_norm.weight": (8,)}
    shapes |= {"blocks.1.feed_forward.router.weight": (4, 8), "blocks.1.feed_forward.experts.gate": (4, 16, 8)}
    shapes["blocks.0.attention.query.weight"] = (8, 8)
    assert [name for name, shape in shapes.items() if settings.is_matrix(name, shape)] == [*shapes][-2:]


@pytest.mark.parametrize("settings", [MuonSettings(), GaLoreSettings(rank=2)])
def test_a_flat_part_of_a_matrix_is_refused(settings: AdamSettings) -> None:
    groups = groups_of(settings, blocks_0_attention_query_weight=(6, 4), blocks_0_attention_key_weight=(6, 4))
    optimizer = settings.build(groups)
    flat = nn.Parameter(torch.zeros(30))
    flat.grad = torch.ones(30)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(HeadraceError, match=r"tensors of shapes \[\[30\]\] for the matrices blocks.0.attention.query"):
        optimizer.step()
    assert isinstance(optimizer, MatrixWise)
    for told in ([torch.zeros(30)], [flat, torch.zeros(30)]):
        optimizer.attach([(told, [], Distributed(0, 1, torch.device("cpu")))])
        with pytest.raises(HeadraceError, match="was not told"):
            optimizer.step()


def test_what_updates_matrices_and_can_not_be_told_where_they_lie_is_refused() -> None:
    from pretrain.engine.expert_groups import expert_groups
    from pretrain.engine.shards import attach_matrices

    settings, alone = MuonSettings(), Distributed(0, 1, torch.device("cpu"))
    groups = groups_of(settings, blocks_0_attention_query_weight=(6, 4))
    with pytest.raises(HeadraceError, match="SGD is to update whole matrices, and is no pretrain"):
        attach_matrices(torch.optim.SGD(groups, lr=0.1), [], {}, 1, alone, expert_groups(1, alone))
