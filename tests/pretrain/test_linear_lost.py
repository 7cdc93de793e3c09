"""LOST against numpy's SVD, its invariants (algorithms.md 2.4), its limits, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.errors import UserError
from pretrain.model import Decoder, ModelSettings, initialize_
from pretrain.model.initialize import normal
from pretrain.model.linear.columns import norms
from pretrain.model.linear.singular import singular_triplets

from .linear_layers import SHAPES, STD, inputs, layer, rule
from .steps import VOCABULARY, batch_of

RANK, SEED = 6, 3


def dense_weight(shape: tuple[int, int], seed: int = SEED) -> np.ndarray:
    """[out_features, in_features] float64: what a dense layer of that name would start with."""
    return normal("layer.weight", (shape[1], shape[0]), STD, seed).double().numpy()


def svd(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, σ, V by numpy, with the entry of largest magnitude of each column of V positive."""
    u, sigma, vt = np.linalg.svd(weight, full_matrices=False)
    signs = np.sign(vt[np.arange(len(sigma)), np.abs(vt).argmax(axis=1)])
    return u * signs, sigma, vt.T * signs


def scored(weight: np.ndarray, terms: slice, count: int, norm: int) -> np.ndarray:
    """The ``count`` columns of largest norm of the part of ``weight`` that these singular values make."""
    u, sigma, v = svd(weight)
    part = (u[:, terms] * sigma[terms]) @ v[:, terms].T
    scores = np.abs(part).sum(axis=0) if norm == 1 else np.sqrt((part**2).sum(axis=0))
    return np.sort(np.argsort(-scores)[:count])


CHOICES: dict[str, tuple[dict[str, Any], slice, int]] = {
    "all": ({}, slice(RANK, None), 2),
    "all, l1": ({"norm": "l1"}, slice(RANK, None), 1),
    "next": ({"residual": "next", "residual_count": 4}, slice(RANK, RANK + 4), 2),
    "next, more than are left": ({"residual": "next", "residual_count": 99}, slice(RANK, None), 2),
    "smallest": ({"residual": "smallest", "residual_count": 3}, slice(-3, None), 2),
    "smallest, more than are left": ({"residual": "smallest", "residual_count": 99}, slice(RANK, None), 2),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("choice", CHOICES)
def test_it_is_the_reference(shape: tuple[int, int], choice: str) -> None:
    given, terms, norm = CHOICES[choice]
    made = layer(shape, kind="lost", rank=RANK, gamma=0.6, column_fraction=0.25, **given)
    weight, x = dense_weight(shape), inputs(shape).detach()
    u, sigma, v = (each[..., :RANK] for each in svd(weight))
    columns = scored(weight, terms, shape[0] // 4, norm)
    assert made.columns.tolist() == columns.tolist()
    a, b = (v * np.sqrt(sigma)).T, u * np.sqrt(sigma)
    np.testing.assert_allclose(made.a.detach().numpy(), a, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(made.b.detach().numpy(), b, rtol=1e-5, atol=1e-6)
    assert torch.equal(made.column_weight, torch.from_numpy(weight[:, columns]).float()), "of W, not of the residual"
    inner = x.double().numpy() @ a.T
    expected = (
        0.6 * (inner / (1 + np.exp(-inner))) @ b.T + 0.4 * x.double().numpy()[..., columns] @ weight[:, columns].T
    )
    np.testing.assert_allclose(made(x).detach().numpy(), expected, rtol=1e-4, atol=1e-6)


def test_the_choices_differ() -> None:
    weight = dense_weight((40, 24))
    found = {tuple(scored(weight, terms, 10, norm)) for _, terms, norm in CHOICES.values()}
    assert len(found) == 4, "or the test above shows nothing; two of the six choices equal `all`"


@pytest.mark.parametrize("shape", SHAPES)
def test_eckart_young_and_balance(shape: tuple[int, int]) -> None:
    made = layer(shape, kind="lost", rank=RANK, gamma=1.0, activation="identity")
    a, b, weight = made.a.detach().double().numpy(), made.b.detach().double().numpy(), dense_weight(shape)
    sigma = np.linalg.svd(weight, compute_uv=False)
    assert ((weight - b @ a) ** 2).sum() == pytest.approx((sigma[RANK:] ** 2).sum(), rel=1e-6)
    np.testing.assert_allclose(a @ a.T, np.diag(sigma[:RANK]), atol=1e-6)
    np.testing.assert_allclose(b.T @ b, np.diag(sigma[:RANK]), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_column_scores_are_the_residual_energy(shape: tuple[int, int]) -> None:
    made = layer(shape, kind="lost", rank=RANK)
    scores = norms(made._scored(torch.from_numpy(dense_weight(shape)), None), "l2").numpy()
    _, sigma, v = svd(dense_weight(shape))
    np.testing.assert_allclose(scores**2, (sigma[RANK:] ** 2 * v[:, RANK:] ** 2).sum(axis=1), rtol=1e-9)
    assert (scores**2).sum() == pytest.approx((sigma[RANK:] ** 2).sum(), rel=1e-9)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 5), (5, 1)])
def test_all_triplets_make_the_weight(shape: tuple[int, int]) -> None:
    weight = dense_weight(shape)
    u, sigma, v = (each.numpy() for each in singular_triplets(torch.from_numpy(weight), 0, min(shape)))
    np.testing.assert_allclose((u * sigma) @ v.T, weight, atol=1e-12)
    np.testing.assert_allclose(u.T @ u, np.eye(min(shape)), atol=1e-9)
    np.testing.assert_allclose(sigma, np.linalg.svd(weight, compute_uv=False), rtol=1e-9)
    assert (v[np.abs(v).argmax(axis=0), np.arange(min(shape))] > 0).all()


def logits(*rules: dict[str, Any], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of a decoder under these rules, whose dense layers all start alike."""
    shape = {"hidden_size": 32, "layers": 2, "heads": 4, "intermediate_size": 48, "init_std": 0.2}
    linear = tuple(rule(**each) for each in rules)
    model = Decoder(ModelSettings(**shape, linear=linear), VOCABULARY)
    initialize_(model, 5)
    batch = batch_of(0, np.arange(4))
    return model.to(dtype)(batch.tokens, batch.positions, batch.document_ids, batch.single_document).detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_columns_and_no_factors_are_the_dense_layer(dtype: torch.dtype) -> None:
    dense = logits(dtype=dtype)
    assert torch.equal(logits({"kind": "lost", "rank": 4, "gamma": 0.0, "column_fraction": 1.0}, dtype=dtype), dense)
    assert torch.equal(logits({"kind": "column_sparse", "column_fraction": 1.0}, dtype=dtype), dense)
    assert not torch.equal(logits({"kind": "column_sparse", "column_fraction": 0.97}, dtype=dtype), dense)


def test_full_rank_without_activation_is_the_dense_layer() -> None:
    whole = {"kind": "lost", "rank": 32, "gamma": 1.0, "activation": "identity"}
    torch.testing.assert_close(logits(whole), logits(), rtol=1e-4, atol=1e-5)
    assert (logits({**whole, "rank": 31}) - logits()).abs().max() > 1e-3


def test_what_gamma_leaves_out_is_not_there() -> None:
    shape = (32, 32)
    names = lambda made: sorted(name for name, _ in (*made.named_parameters(), *made.named_buffers()))  # noqa: E731
    assert names(layer(shape, kind="lost", rank=4)) == ["a", "b", "column_weight", "columns"]
    assert names(layer(shape, kind="lost", rank=4, gamma=1.0)) == ["a", "b"]
    assert names(layer(shape, kind="lost", rank=4, gamma=0.0)) == ["column_weight", "columns"]
    silu, x = layer(shape, kind="lost", rank=4, gamma=1.0), inputs(shape)
    cola = layer(shape, kind="cola", rank=4)
    cola.load_state_dict(silu.state_dict())
    assert torch.equal(silu(x), cola(x)), "gamma 1 is CoLA with another start"


@pytest.mark.parametrize("kind", ["lost", "column_sparse"])
def test_the_sparse_part_is_a_dense_layer_under_a_column_mask(kind: str) -> None:
    shape, extra = (40, 24), {"rank": RANK, "gamma": 0.0} if kind == "lost" else {}
    made, x = layer(shape, kind=kind, column_fraction=0.3, **extra), inputs(shape)
    weight = torch.from_numpy(dense_weight(shape)).float().requires_grad_()
    mask = torch.zeros(shape[0])
    mask[made.columns] = 1
    target = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2))
    (made(x) * target).sum().backward()
    gradient, x.grad = x.grad, None
    ((x @ (mask * weight).T) * target).sum().backward()
    torch.testing.assert_close(made.column_weight.grad, weight.grad[:, made.columns])
    assert weight.grad[:, mask == 0].eq(0).all()
    assert made.column_weight.shape == (24, 12), "the other columns have no parameter, gradient or optimizer state"
    torch.testing.assert_close(gradient, x.grad)


def test_random_columns() -> None:
    shape = (40, 24)
    for made in (
        layer(shape, kind="lost", rank=RANK, columns="random", column_fraction=0.25),
        layer(shape, kind="column_sparse", column_fraction=0.25),
    ):
        columns = made.columns.tolist()
        assert columns == sorted(set(columns))
        assert len(columns) == 10
        assert made.columns.dtype == torch.int64
        assert columns != scored(dense_weight(shape), slice(RANK, None), 10, 2).tolist()
        assert torch.equal(made.column_weight, torch.from_numpy(dense_weight(shape)).float()[:, columns])
    drawn = [layer(shape, seed, kind="column_sparse", column_fraction=0.25).columns for seed in range(200)]
    counts = torch.cat(drawn).bincount(minlength=40)
    # each column is in a draw with probability 1/4: mean 50, standard deviation 6.1
    assert 25 < counts.min() < counts.max() < 75


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_columns_by_their_norm(norm: str) -> None:
    made = layer((40, 24), kind="column_sparse", column_fraction=0.25, columns="norm", norm=norm)
    scores = np.linalg.norm(dense_weight((40, 24)), ord=int(norm[1]), axis=0)
    assert made.columns.tolist() == np.sort(np.argsort(-scores)[:10]).tolist()


def test_the_number_of_columns_is_the_floor_and_at_least_one() -> None:
    for fraction, expected in ((0.29, 29), (0.299, 29), (0.001, 1), (1.0, 100)):
        assert layer((100, 4), kind="column_sparse", column_fraction=fraction).columns.shape == (expected,)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"rank": 33, "modules": ["attention.*"]},
            "attention.query [32, 32]: rank 33 is above the smaller of its sides",
        ),
        ({"rank": 32}, "attention.query [32, 32]: rank 32 is its smaller side, so that no singular value is left"),
        ({"rank": 0}, "'linear.0.rank' = 0"),
        ({"column_fraction": 0.0}, "'linear.0.column_fraction' = 0.0: input should be greater than 0"),
        ({"column_fraction": 1.1}, "'linear.0.column_fraction' = 1.1: input should be less than or equal to 1"),
        ({"gamma": 1.1}, "'linear.0.gamma' = 1.1"),
        ({"gamma": 1.0, "column_fraction": 0.5, "norm": "l1"}, "column_fraction and norm has no meaning with gamma 1"),
        ({"gamma": 0.0, "activation": "relu"}, "activation has no meaning with gamma 0"),
        ({"columns": "random", "residual": "next", "residual_count": 3}, "has no meaning with columns random"),
        ({"residual": "next"}, "residual next needs residual_count"),
        ({"residual_count": 5}, "residual_count 5 has no meaning with residual all"),
        ({"kind": "column_sparse", "rank": None, "column_fraction": 2.0}, "'linear.0.column_fraction' = 2.0"),
        ({"kind": "column_sparse", "rank": None, "column_fraction": 0.5, "norm": "l1"}, "norm l1 has no meaning"),
    ],
)
def test_settings_that_can_not_be_meant_are_refused(given: dict[str, Any], said: str) -> None:
    content = {"kind": "lost", "rank": 4, **given}
    with pytest.raises(UserError) as caught:
        rule(**{key: value for key, value in content.items() if value is not None})
    assert said in str(caught.value)
