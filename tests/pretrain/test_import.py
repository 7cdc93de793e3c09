"""Initial weights from elsewhere: every rank and stage starts with exactly those, or is refused with the reason."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import DataError, UserError
from data_pipeline.testing import tiny_tokenizer
from pretrain.config import Config
from pretrain.initial_weights import open_weights
from tests.ranks import run_on_ranks

from .exports import TOKENIZER, config_of, save_checkpoints, vocab_size

ODD = {"hidden_size": 33, "heads": 4, "kv_heads": 2, "head_dim": 8}
"""Sizes that two ranks can't share evenly."""


def importing(path: Path, **sections: Any) -> Config:
    """A tiny run that starts with what ``path`` holds."""
    return config_of({"weights_from": str(path), **sections.pop("model", {})}, **sections)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    run_on_ranks(save_checkpoints, 1, folder, {"base": {}, "odd": ODD})
    return folder / "base" / "step_000000000"


def start_with(path: Path) -> None:
    """On one of two ranks: at every stage the parameters are those of ``path``, bit for bit."""
    from pretrain.distributed import start
    from pretrain.engine import Engine

    ranks = start(60)
    for stage, precision in itertools.product((0, 1, 2, 3), ("fp32", "bf16")):
        engine = {"zero_stage": stage, **({"persistence_threshold": 0} if stage == 3 else {})}
        config = importing(path, model=ODD, engine=engine, training={"precision": precision})
        initial = ranks.broadcast_object(open_weights(config, TOKENIZER) if ranks.rank == 0 else None)
        if ranks.rank:
            initial.path = Path("nowhere")  # only rank 0 has to see the files
        whole = Engine(config, vocab_size(config), ranks, initial).full_parameters()
        there = open_weights(config, TOKENIZER)
        assert there is not None
        assert set(whole) == set(there.shapes)
        for name, parameter in whole.items():
            assert torch.equal(parameter, there.read(name)), (stage, precision, name)


def test_every_stage_starts_with_a_checkpoints_weights(checkpoint: Path) -> None:
    run_on_ranks(start_with, 2, checkpoint.parents[1] / "odd" / checkpoint.name)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"hidden_size": 64}, "model.hidden_size is 32 there and 64 here"),
        ({"layers": 3}, "model.layers is 2 there and 3 here"),
        ({"kv_heads": 4}, "model.kv_heads is 2 there and 4 here"),
        ({"heads": 8, "kv_heads": 4, "head_dim": 4}, "model.heads is 4 there and 8 here"),
        ({"rope_theta": 5e5}, "model.rope_theta is 10000.0 there and 500000.0 here"),
        ({"norm_eps": 1e-6}, "model.norm_eps is 1e-05 there and 1e-06 here"),
        ({"qk_norm": True}, "model.qk_norm is False there and True here"),
        ({"tied_embeddings": True}, "model.tied_embeddings is False there and True here"),
        ({"vocab_size": 384}, "embedding.weight is [300, 32] there and [384, 32] here"),
    ],
)
def test_weights_of_another_model_are_refused(checkpoint: Path, model: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as refusal:
        open_weights(importing(checkpoint, model=model), TOKENIZER)
    assert reason in str(refusal.value)


def test_the_same_shape_in_other_words_fits(checkpoint: Path) -> None:
    weights = open_weights(importing(checkpoint, model={"head_dim": 8, "init_std": 1.0}), TOKENIZER)
    assert weights is not None
    assert weights.shapes["blocks.1.attention.key.weight"] == (16, 32)


def test_weights_of_another_tokenizer_are_refused(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="was trained with another tokenizer"):
        open_weights(importing(checkpoint), tiny_tokenizer(310))


def test_no_weights_and_damaged_weights_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no weights"):
        open_weights(importing(tmp_path), TOKENIZER)
    for file in (path for path in checkpoint.rglob("*") if path.is_file()):
        copy = tmp_path / file.relative_to(checkpoint)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
    assert open_weights(importing(tmp_path), TOKENIZER)
    (tmp_path / "rank_00000.pt").write_bytes(b"")
    with pytest.raises(DataError, match="damaged"):
        open_weights(importing(tmp_path), TOKENIZER)
