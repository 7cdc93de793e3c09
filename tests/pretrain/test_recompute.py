"""Recompute of factorised layers (CoLA-M): the same bits, and only the r-dimensional activations kept."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipeline.errors import UserError
from pretrain.model import Decoder, initialize_
from pretrain.model.recompute import first_product, run_block
from tests.ranks import run_on_ranks

from .steps import VOCABULARY, run_engine, tiny_config
from .test_same_update import assert_same_bits

RANK, ROWS, LENGTH, LAYERS = 6, 3, 20, 2
CHOICES = ("none", "full", "low_rank")
COLA = {"kind": "cola", "rank": RANK}
RULES: dict[str, list[dict[str, Any]]] = {
    "low_rank": [{"kind": "low_rank", "rank": RANK}],
    "cola": [COLA],
    "lost": [{"kind": "lost", "rank": RANK, "column_fraction": 0.1}],
    "beside other layers": [
        {**COLA, "modules": ["attention.query", "feed_forward.down"]},
        {"kind": "sltrain", "rank": RANK, "alpha": 8.0, "modules": ["attention.value"], "layers": "1"},
    ],
}


def decoder(how: str, rules: list[dict[str, Any]], dtype: torch.dtype = torch.float32) -> Decoder:
    model = Decoder(tiny_config(model={"layers": LAYERS, "linear": rules}).model, VOCABULARY, how)
    initialize_(model, 7)
    return model.to(dtype)


def logits(model: Decoder) -> Tensor:
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(LENGTH).expand(ROWS, LENGTH)
    made: Tensor = model(tokens, positions, torch.zeros_like(tokens), True)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_the_gradients_are_the_same_bits(rules: list[dict[str, Any]], dtype: torch.dtype) -> None:
    found = []
    for how in CHOICES:
        model = decoder(how, rules, dtype)
        made = logits(model)
        made.float().logsumexp(-1).square().mean().backward()
        found.append([made.detach(), *(parameter.grad for parameter in model.parameters())])
    for recomputed in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], recomputed, strict=True))


class Products(TorchDispatchMode):
    """Counts the matrix products by their shape."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mm.default:
            self.shapes.append(tuple(made.shape))
        return made


def test_the_first_products_are_not_computed_again() -> None:
    """A layer's backward pass has one product of [tokens, r] of its own: the gradient of the inner features."""
    tokens, layers = ROWS * LENGTH, 7 * LAYERS
    for how, again in (("none", 0), ("low_rank", 0), ("full", layers)):
        made = logits(decoder(how, [COLA]))
        with Products() as products:
            made.sum().backward()
        assert products.shapes.count((tokens, RANK)) == layers + again, how


class Storages(TorchDispatchMode):
    """Remembers, weakly, the memory of everything that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return made

    def alive(self) -> int:
        return sum(size for storage, size in self.made.values() if not storage.expired())


def kept_bytes(how: str, rules: list[dict[str, Any]]) -> int:
    """Bytes that live between forward and backward pass and were made in the forward pass."""
    model = decoder(how, rules)
    with Storages() as storages:
        made = logits(model)
    alive = storages.alive()
    made.sum().backward()
    return alive


def test_only_the_inner_features_are_kept_besides_the_inputs_of_the_blocks() -> None:
    full, kept, none = (kept_bytes(how, [COLA]) for how in ("full", "low_rank", "none"))
    assert kept - full == 7 * LAYERS * ROWS * LENGTH * RANK * 4
    assert none > 2 * kept
    some = RULES["beside other layers"]
    assert kept_bytes("low_rank", some) - kept_bytes("full", some) == 2 * LAYERS * ROWS * LENGTH * RANK * 4


@pytest.mark.parametrize("how", CHOICES)
def test_a_forward_pass_without_a_backward_pass_leaves_nothing(how: str) -> None:
    model = decoder(how, [COLA])
    with Storages() as storages:
        made = logits(model)
    before = storages.alive()
    kept = made.untyped_storage().nbytes()
    del made
    gc.collect()
    assert before > kept + storages.alive()
    assert storages.alive() == own_bytes(model, storages)


def own_bytes(model: Decoder, storages: Storages) -> int:
    """Of the model's weights, views of which are made in a forward pass."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    return sum(size for storage, (_, size) in storages.made.items() if storage in weights)


def test_without_gradients_nothing_is_kept_and_an_error_leaves_nothing_behind() -> None:
    weight = nn.Parameter(torch.ones(2, 3))

    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first_product(x, weight)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run_block(Failing(), "low_rank", torch.ones(4, 3, requires_grad=True))
    assert type(first_product(torch.ones(4, 3), weight).grad_fn).__name__ == "MmBackward0"
    with torch.no_grad():
        assert torch.equal(logits(decoder("low_rank", [COLA])), logits(decoder("none", [COLA])))


def engines(cases: list[dict[str, dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """On one rank: of every case, what ``run_engine`` saw with each choice."""
    from pretrain.distributed import start

    ranks = start(60)

    def seen(case: dict[str, dict[str, Any]], how: str) -> dict[str, Any]:
        training = {"micro_batch": 2, **case["training"], "activation_checkpointing": how}
        return run_engine(tiny_config(**{**case, "training": training}), ranks)

    return [[seen(case, how) for how in ("none", "low_rank")] for case in cases]


@pytest.mark.slow
def test_no_update_changes_by_a_bit_at_any_stage() -> None:
    cases = [
        {
            "model": {"linear": RULES[rules]},
            "engine": {"zero_stage": stage, **({"persistence_threshold": 0} if stage == 3 else {})},
            "training": {"precision": precision},
        }
        for stage, rules, precision in [
            (0, "cola", "fp32"),
            (1, "lost", "bf16"),
            (2, "beside other layers", "fp32"),
            (3, "cola", "bf16"),
            (3, "lost", "fp32"),
        ]
    ]
    found = run_on_ranks(engines, 2, cases)[0]
    assert len(found) == len(cases)
    for plain, recomputed in found:
        assert_same_bits(plain, recomputed)


def refusal(**sections: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        tiny_config(**sections)
    return str(caught.value)


def test_it_is_refused_where_it_would_do_nothing_or_can_not_be() -> None:
    sltrain = {"kind": "sltrain", "rank": 4, "alpha": 8.0}
    told = "keeps the r-dimensional activations of factorised layers, and model.linear makes none (its layers are "
    training = {"activation_checkpointing": "low_rank"}
    assert f"{told}dense)" in refusal(training=training)
    assert f"{told}sltrain)" in refusal(training=training, model={"linear": [sltrain]})
    only_columns = {"kind": "lost", "rank": 4, "gamma": 0.0, "column_fraction": 0.1, "modules": ["attention.*"]}
    assert f"{told}dense, lost)" in refusal(training=training, model={"linear": [only_columns]})
    compiled = refusal(training={**training, "compile": True}, model={"linear": [COLA]})
    assert "activation_checkpointing low_rank" in compiled
    assert "set compile=false" in compiled
