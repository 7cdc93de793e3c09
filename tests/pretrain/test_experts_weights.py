"""Weights of a mixture of experts from a checkpoint of any stage, and what they don't fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import UserError
from pretrain.initial_weights import open_weights
from tests.ranks import run_on_ranks

from .exports import TOKENIZER, config_of, our_logits, save_checkpoints

MIXTURE = {"number": 4, "top_k": 2, "intermediate_size": 12, "shared": 1, "selection_bias": True}


def model_of(checkpoint: Path | None = None, **experts: Any) -> dict[str, Any]:
    return {"experts": {**MIXTURE, **experts}, "weights_from": str(checkpoint) if checkpoint else None}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of stages 0 to 3: random weights, and what runs that begin with the first one's save before any step."""
    folder = tmp_path_factory.mktemp("experts")
    first = folder / "0/step_000000000"
    bias = {"objective": {"balancing": {"bias": {}}}}
    run_on_ranks(save, 1, folder, {"0": model_of(), **{str(stage): model_of(first) for stage in (1, 2, 3)}}, bias)
    return folder


def save(folder: Path, models: dict[str, dict[str, Any]], sections: dict[str, Any]) -> None:
    save_checkpoints(folder, models, **sections)


def path_of(checkpoints: Path, name: str) -> Path:
    return checkpoints / name / "step_000000000"


def test_every_stage_saves_and_begins_with_the_same_values(checkpoints: Path) -> None:
    opened = [open_weights(config_of(model_of(path_of(checkpoints, str(stage)))), TOKENIZER) for stage in range(4)]
    assert opened[0] is not None
    for weights in opened[1:]:
        assert weights is not None
        assert weights.shapes == opened[0].shapes
        for name in weights.shapes:
            assert torch.equal(weights.read(name).float(), opened[0].read(name).float()), name
    assert opened[0].shapes["blocks.1.feed_forward.experts.gate"] == (4, 12, 32)
    assert opened[0].shapes["blocks.1.feed_forward.router.selection_bias"] == (4,)
    assert opened[0].read("blocks.1.feed_forward.router.selection_bias").abs().max() > 0.01
    assert our_logits(opened[0], list(range(3, 20))).isfinite().all()


def test_other_experts_are_refused_with_what_differs(checkpoints: Path) -> None:
    for changes, reason in (
        ({"top_k": 3}, "model.experts.top_k is 2 there and 3 here"),
        ({"number": 8}, "model.experts.number is 4 there and 8 here"),
        ({"score": "sigmoid"}, "model.experts.score is 'softmax' there and 'sigmoid' here"),
        ({"normalised": False}, "model.experts.normalised is True there and False here"),
        ({"dense_first": 1}, "model.experts is 'in the blocks [0, 1]' there and 'in the blocks [1]' here"),
        ({"selection_bias": False}, "blocks.0.feed_forward.router.selection_bias [4] is only there"),
    ):
        with pytest.raises(UserError) as refusal:
            open_weights(config_of(model_of(path_of(checkpoints, "0"), **changes)), TOKENIZER)
        assert reason in str(refusal.value)


def test_what_is_of_training_alone_may_differ(checkpoints: Path) -> None:
    training = {"jitter": 0.1, "capacity": {"factor": 1.5}, "entropy": {}}
    unused = {"intermediate_size": 17}  # of the blocks without experts, which there are none of
    config = config_of(
        {**model_of(path_of(checkpoints, "0"), **training), **unused},
        objective={"balancing": {"losses": [{"kind": "entropy", "coefficient": 0.01}]}},
    )
    assert open_weights(config, TOKENIZER)
