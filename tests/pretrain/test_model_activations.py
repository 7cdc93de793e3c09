"""The estimate of activation memory against what a small decoder keeps: memory that is alive, counted as it is made."""

from __future__ import annotations

import weakref
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipeline.settings import build_settings
from pretrain.model import Decoder, ModelSettings, activation_bytes, initialize_
from pretrain.model.experts.noise import noise_keys
from pretrain.objective.cross_entropy import sequence_cross_entropy, sequence_squared_log_partition
from pretrain.objective.losses.spherical_z import SphericalZSettings

from .steps import LENGTH, batch_of

ROWS = 8
TOKENS = ROWS * LENGTH
GPU = torch.cuda.is_available()


class Alive(TorchDispatchMode):
    """Bytes of memory that operations inside made, besides that of ``before``, and that are still there: now and at
    the most."""

    def __init__(self, *before: Tensor) -> None:
        super().__init__()
        self._before = [tensor.untyped_storage() for tensor in before]  # a view of one is no new memory
        self._known = {id(storage) for storage in self._before}
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._known:
            return
        size = storage.nbytes()
        self._known.add(id(storage))
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, id(storage), size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def model_settings(vocab_size: int = 16, **changes: Any) -> ModelSettings:
    shape = {"hidden_size": 48, "layers": 3, "heads": 4, "head_dim": 16, "intermediate_size": 80}
    return build_settings(ModelSettings, {**shape, "vocab_size": vocab_size, **changes}, "test")


def measured(
    settings: ModelSettings, dtype: torch.dtype, recompute: Any = "none", single: bool = False, loss: str = ""
) -> tuple[int, int]:
    """Bytes alive after the forward pass without the loss, and the most up to the end of the backward pass."""
    device = "cuda" if GPU else "cpu"
    assert settings.vocab_size
    model = Decoder(settings, settings.vocab_size, recompute)
    initialize_(model, 1)
    model.to(device, dtype)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # there before, so that the backward pass adds to it
    batch = batch_of(0, np.arange(ROWS)).to(torch.device(device))
    tokens = batch.tokens % settings.vocab_size
    gradients = [parameter.grad for parameter in model.parameters()]
    keys = noise_keys(1, batch.run_positions)
    inputs = (tokens, batch.positions, batch.document_ids, batch.labels, batch.loss_mask, keys)
    with Alive(*model.parameters(), *model.buffers(), *gradients, *inputs) as alive:
        labels = batch.labels % settings.vocab_size
        given = labels if loss == "moments" else None
        output, routing = model(tokens, batch.positions, batch.document_ids, single, batch.loss_mask, keys, given, True)
        after = alive.now - output.untyped_storage().nbytes()
        if loss == "moments":
            total = SphericalZSettings().of_tokens(output, labels, batch.loss_mask).sum()
        else:
            total = sequence_cross_entropy(output, labels, batch.loss_mask).sum()
        if loss == "z_loss":
            total = total + sequence_squared_log_partition(output, batch.loss_mask).sum()
        if routing is not None:
            total = total + routing.sum()
        del output, routing
        total.backward()
    return after, alive.most


CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "grouped": {"kv_heads": 2},
    "qk_norm": {"kv_heads": 2, "qk_norm": True},
    "all heads' qk_norm": {"kv_heads": 2, "qk_norm": "all_heads"},
    "cola": {"linear": [{"kind": "cola", "rank": 8}]},
    "lost": {"linear": [{"kind": "lost", "rank": 8, "column_fraction": 0.3, "layers": "0-1"}]},
    "columns": {"linear": [{"kind": "column_sparse", "column_fraction": 0.3}]},
    "some columns": {"linear": [{"kind": "column_sparse", "column_fraction": 0.3, "modules": ["attention.query"]}]},
    "low_rank down": {"linear": [{"kind": "low_rank", "rank": 8, "modules": ["feed_forward.down"]}]},
}


EXPERTS = {"number": 6, "top_k": 2, "intermediate_size": 20}
CASES |= {
    "experts": {"experts": EXPERTS},
    "experts, shared and jitter": {"experts": {**EXPERTS, "shared": 1, "dense_first": 1, "jitter": 0.1}},
    "experts, hybrid": {"experts": {**EXPERTS, "routing": "hybrid", "entropy": {}}},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_what_a_forward_pass_keeps(case: str, single: bool, dtype: torch.dtype) -> None:
    settings = model_settings(**CASES[case])
    kept, _ = measured(settings, dtype, single=single)
    told = activation_bytes(settings, 16, LENGTH, dtype.itemsize, "none", single_document=single, fused_norms=GPU)
    assert told.recomputed == 0
    assert TOKENS * (told.blocks + told.rest) == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("case", ["dense", "lost", "cola"])
@pytest.mark.parametrize("recompute", ["full", "low_rank"])
def test_what_is_kept_for_recomputing(case: str, recompute: Literal["full", "low_rank"]) -> None:
    settings = model_settings(**CASES[case])
    kept, _ = measured(settings, torch.float32, recompute)
    told = activation_bytes(settings, 16, LENGTH, 4, recompute, fused_norms=GPU)
    assert TOKENS * (told.blocks + told.rest) == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "z_loss"), [(16, False), (2048, False), (2048, True)])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_peak(recompute: Literal["none", "full"], vocab_size: int, z_loss: bool, dtype: torch.dtype) -> None:
    """With a small vocabulary the blocks make the peak, with a large one the loss."""
    settings = model_settings(vocab_size, layers=6)
    _, most = measured(settings, dtype, recompute, loss="z_loss" if z_loss else "")
    told = activation_bytes(settings, vocab_size, LENGTH, dtype.itemsize, recompute, z_loss, fused_norms=GPU)
    print(TOKENS * told.peak / most, (most - TOKENS * told.peak) / TOKENS / vocab_size)
    assert TOKENS * told.peak == pytest.approx(most, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_of_a_loss_of_moments(dtype: torch.dtype) -> None:
    """In one narrow block the loss makes the peak; a vocabulary 128 times as large takes no more for each token."""
    settings = model_settings(layers=1, heads=2, head_dim=4, intermediate_size=8)
    _, most = measured(settings, dtype, loss="moments")
    _, large = measured(settings.model_copy(update={"vocab_size": 2048}), dtype, loss="moments")
    told = activation_bytes(settings, 16, LENGTH, dtype.itemsize, "none", from_moments=True, fused_norms=GPU)
    assert TOKENS * told.peak == pytest.approx(most, rel=0.05)
    assert large - most <= 3 * 4 * (2048 - 16) * settings.hidden_size, "copies of the head's weight in fp32"
