"""Initial weights from elsewhere: every rank and stage starts with exactly those, or is refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import DataError, UserError
from data_pipeline.testing import tiny_tokenizer
from pretrain.config import Config
from pretrain.initial_weights import open_weights
from pretrain.model import Decoder, initialize_
from pretrain.run_folder import plain
from tests.ranks import run_on_ranks

from .steps import tiny_config

TOKENIZER = tiny_tokenizer()


def importing(path: Path, **sections: dict[str, Any]) -> Config:
    """A tiny run, of the tiny tokenizer's vocabulary, that starts with what ``path`` holds."""
    model = {"vocab_size": None, "weights_from": str(path), **sections.pop("model", {})}
    return tiny_config(model=model, **sections)


def save_checkpoint(folder: Path, **sections: dict[str, Any]) -> None:
    """On one rank: ``folder/step_000000000`` with the drawn weights of seed 7."""
    from pretrain.checkpoint import CheckpointStore
    from pretrain.distributed import start
    from pretrain.engine import Engine

    ranks = start(60)
    config = tiny_config(**{**sections, "model": {"vocab_size": TOKENIZER.vocab_size, **sections.get("model", {})}})
    engine = Engine(config, TOKENIZER.vocab_size, ranks)
    state = {
        "step": 0,
        "config": plain(config),
        "model": {"vocab_size": TOKENIZER.vocab_size},
        "data": {"tokenizer": TOKENIZER.sha256},
    }
    CheckpointStore(folder, config.checkpoint, ranks).save(engine, state)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    run_on_ranks(save_checkpoint, 1, folder)
    return folder / "step_000000000"


def start_with(path: Path) -> None:
    """On one of two ranks: at every stage, the parameters are those of the drawn weights of seed 7, bit for bit."""
    from pretrain.distributed import start
    from pretrain.engine import Engine

    ranks = start(60)
    for stage in (0, 1, 2, 3):
        config = importing(path, run={"seed": 8}, engine={"zero_stage": stage})
        initial = ranks.broadcast_object(open_weights(config, TOKENIZER) if ranks.rank == 0 else None)
        if ranks.rank:
            del initial.__dict__["path"]  # nothing but rank 0 reads
        model = Decoder(config.model, TOKENIZER.vocab_size)
        initialize_(model, seed=7)
        whole = Engine(config, TOKENIZER.vocab_size, ranks, initial).full_parameters()
        assert whole.keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            assert torch.equal(whole[name], parameter), (stage, name)


def test_every_stage_starts_with_a_checkpoints_weights(checkpoint: Path) -> None:
    run_on_ranks(start_with, 2, checkpoint)


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
    with pytest.raises(UserError, match="is no complete checkpoint"):
        open_weights(importing(tmp_path), TOKENIZER)
    for file in (path for path in checkpoint.rglob("*") if path.is_file()):
        copy = tmp_path / file.relative_to(checkpoint)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
    assert open_weights(importing(tmp_path), TOKENIZER)
    (tmp_path / "rank_00000.pt").write_bytes(b"")
    with pytest.raises(DataError, match="damaged"):
        open_weights(importing(tmp_path), TOKENIZER)
