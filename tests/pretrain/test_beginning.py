"""What a run begins with: masks by another run's weights, the place it rewinds to; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import UserError
from pretrain.beginning import Beginning, open_beginning
from pretrain.config import Config
from pretrain.data import open_data
from pretrain.export.export import export_checkpoint
from pretrain.initial_masks import decide_masks, open_masks
from pretrain.initial_weights import CheckpointWeights
from pretrain.state import TrainState, rewound_state
from tests.ranks import run_on_ranks

from . import test_resume_data
from .exports import config_of, save_checkpoints, vocab_size

GRADUAL = {"begin_step": 0, "end_step": 1, "every_steps": 1}
PRUNED = {"kind": "magnitude_pruned", "sparsity": 0.5, "gradual": GRADUAL}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights and, in ``pruned``, random masks that keep about half of every layer."""
    folder = tmp_path_factory.mktemp("checkpoints")
    models = {"dense": {}, "pruned": {"linear": [PRUNED]}, "cola": {"linear": [{"kind": "cola", "rank": 4}]}}
    run_on_ranks(save_checkpoints, 1, folder, models)
    return folder


def path_of(checkpoints: Path, name: str) -> Path:
    return checkpoints / name / "step_000000000"


def masked(path: Path, *rules: dict[str, Any], **model: Any) -> Config:
    """A run whose layers are masked by ``path``, 60 % of each unless a rule says otherwise."""
    made = [{"kind": "magnitude_pruned", "sparsity": 0.6, "mask_from": str(path), **rule} for rule in rules or ({},)]
    return config_of({"linear": made, **model})


def decided(config: Config) -> dict[str, Tensor]:
    return {name: mask for source in open_masks(config) for name, mask in decide_masks(source).items()}


def test_masks_are_those_of_the_other_runs_weights(checkpoints: Path) -> None:
    """Also where that run has pruned: the values of what it pruned do not count."""
    for name in ("dense", "pruned"):
        weights = CheckpointWeights(path_of(checkpoints, name))
        found = decided(masked(path_of(checkpoints, name)))
        assert len(found) == 14
        for key, mask in found.items():
            values = weights.read(f"{key[:-4]}weight").detach().abs()
            if name == "pruned":
                assert not (mask & ~weights.read(key)).any()
                values = values * weights.read(key)
            assert int(mask.sum()) == mask.numel() - int(0.6 * mask.numel() + 1e-9)
            assert values[mask].min() >= values[~mask].max()


def test_rules_choose_their_layers_and_their_scope(checkpoints: Path) -> None:
    rules = {"modules": ["attention.*"], "layers": "1", "scope": "global"}, {"modules": ["feed_forward.up"]}
    config = masked(path_of(checkpoints, "dense"), *rules)
    found = decided(config)
    assert sorted(found) == [
        *("blocks.0.feed_forward.up.mask",),
        *(f"blocks.1.attention.{name}.mask" for name in ("key", "output", "query", "value")),
        "blocks.1.feed_forward.up.mask",
    ]
    attention = [mask for name, mask in found.items() if "attention" in name]
    size = sum(mask.numel() for mask in attention)
    assert sum(int(mask.sum()) for mask in attention) == size - int(0.6 * size)
    assert len({int(mask.sum()) / mask.numel() for mask in attention}) > 1


def begun(path: Path) -> list[dict[str, Tensor]]:
    """On one of two ranks: the masks and weights that a run has at each stage, and what it was to begin with."""
    from pretrain.distributed import start
    from pretrain.engine import Engine

    ranks = start(60)
    found = []
    for stage in (0, 3):
        engine = {"zero_stage": stage, **({"persistence_threshold": 0} if stage == 3 else {})}
        rule = {"kind": "magnitude_pruned", "sparsity": 0.6, "mask_from": str(path), "layers": "0"}
        config = config_of({"linear": [rule], "weights_from": str(path)}, engine=engine)
        weights = CheckpointWeights(path)
        sources = open_masks(config)
        shapes = {f"{name}.mask": shape for source in sources for name, shape in source.layers.items()}
        beginning = Beginning(TrainState(), weights, sources, {**weights.shapes, **shapes})
        if ranks.rank == 0:
            beginning.decide_masks()
        there = ranks.broadcast_object(beginning)
        assert ranks.rank == 0 or not there._masks, "every rank was sent all masks"
        made = Engine(config, vocab_size(config), ranks, there)
        found.append({**made.full_parameters(), **dict(made._engine.module.named_buffers())})
    return found


@pytest.mark.slow
def test_every_rank_begins_with_the_masks_and_the_weights(checkpoints: Path) -> None:
    path = path_of(checkpoints, "dense")
    weights, masks = CheckpointWeights(path), decided(masked(path, {"layers": "0"}))
    for of_rank in run_on_ranks(begun, 2, path):
        for found in of_rank:
            assert found.keys() == weights.shapes.keys() | masks.keys()
            for name, value in found.items():
                expected = masks[name] if name in masks else weights.read(name)
                assert torch.equal(value, expected), name


def refusal(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        decided(config)
    return str(caught.value)


def test_what_can_not_give_a_mask_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    dense = path_of(checkpoints, "dense")
    assert "linear.0 (magnitude_pruned): mask_from = " in refusal(masked(tmp_path))
    assert "is no complete checkpoint" in refusal(masked(tmp_path))
    assert "has no weight [64, 32] of blocks.0.feed_forward.gate" in refusal(masked(dense, intermediate_size=64))
    assert "has no weight [32, 32] of blocks.2.attention.query" in refusal(masked(dense, layers=3))
    told = "keeps blocks.0.attention.query as cola, of which no entries can be pruned. Give a run of the same model"
    assert told in refusal(masked(path_of(checkpoints, "cola")))


def test_what_the_other_run_has_pruned_does_not_come_back(checkpoints: Path) -> None:
    pruned = path_of(checkpoints, "pruned")
    told = refusal(masked(pruned, {"sparsity": 0.3}))
    assert "of the weights of blocks.0.attention.query left, and sparsity 0.3 would keep 0.7" in told
    least = float(told.rpartition("at least ")[2].rstrip("."))
    assert 0.4 < least < 0.6
    assert "and the other layers" in refusal(masked(pruned, {"sparsity": 0.3, "scope": "global"}))


def test_rewinding_takes_step_and_position(tmp_path: Path) -> None:
    folder, checkpoint = test_resume_data.write(tmp_path / "data"), tmp_path / "checkpoint"
    other_folder = str(test_resume_data.write(tmp_path / "other", first=6))
    sources = {name: {"path": other_folder, "domain": name, "max_epochs": None} for name in "ab"}
    settings = test_resume_data.config(folder)
    test_resume_data.save(checkpoint, settings, TrainState(step=2, position=16, holes=3, evaluated=True))
    assert rewound_state(checkpoint, settings, open_data(settings)) == TrainState(step=2, position=16)
    for changes, reason in (
        ({"run": {"name": "x", "seed": 8}}, "stands at position 16 of other data than this run's (the seed was 7 and"),
        ({"data": {"seq_len": 32}}, "of other data than this run's (source 'a' had 7 sequences and now has 4"),
        ({"data": {"sources": sources}}, "in the checkpoint, {a: "),
        ({"data": {"skip_ranges": [[0, 8]]}}, "before its position 16 the positions none were left out"),
        ({"training": {"steps": 2}}, "stands at step 2, and the run has only 2 steps"),
    ):
        other = test_resume_data.config(folder, **changes)
        with pytest.raises(UserError) as refused:
            rewound_state(checkpoint, other, open_data(other))
        assert reason in str(refused.value)


def test_rewinding_needs_a_checkpoint_of_ours(checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.rewind needs model\.weights_from"):
        config_of({}, training={"rewind": True})
    exported, folder = tmp_path / "exported", test_resume_data.write(tmp_path / "data")
    export_checkpoint(path_of(checkpoints, "dense"), exported, tokenizer="none")
    settings = config_of({"weights_from": str(exported)}, training={"rewind": True})
    given = test_resume_data.config(folder)
    with pytest.raises(UserError, match="holds no place in a run"):
        open_beginning(settings, open_data(given))
    beginning = open_beginning(given, open_data(given))
    assert (beginning.state, beginning.weights, beginning.shapes) == (TrainState(), None, {})
