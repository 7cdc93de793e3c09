"""What `pretrain export` writes computes, in transformers, what the checkpoint computes here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from pretrain.export.export import export_checkpoint
from pretrain.initial_weights import CheckpointWeights
from tests.ranks import run_on_ranks

from .exports import TEXT, TOKENIZER, our_logits, save_checkpoints, spread, write_tokenizer


def linear(**rule: Any) -> dict[str, Any]:
    return {"linear": [rule]}


MUP = {
    "mup": {
        "base": {"hidden_size": 16, "heads": 2, "head_dim": 4, "intermediate_size": 24},
        "output_multiplier": 3.0,
        "embedding_multiplier": 5.0,
    }
}
LOST = {"kind": "lost", "rank": 6, "column_fraction": 0.2, "gamma": 0.6}
SLTRAIN = {"kind": "sltrain", "rank": 6, "alpha": 9.0, "nonzero_fraction": 0.05}

DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("Llama", {"rope_theta": 500.0, "norm_eps": 0.01}),
    "tied": ("Llama", {"tied_embeddings": True, "kv_heads": 1}),
    "wide_heads": ("Llama", {"head_dim": 14, "kv_heads": None}),
    "odd_heads": ("Mistral", {"heads": 6, "kv_heads": 3, "head_dim": 10}),
    "qk_norm": ("Qwen3", {"qk_norm": True, "rope_theta": 300.0, "norm_eps": 0.01}),
    "odd_qk_norm": ("Qwen3", {"qk_norm": True, "heads": 6, "kv_heads": 2, "head_dim": 4, "tied_embeddings": True}),
    "rounded_vocabulary": ("Llama", {"vocab_size": 384}),
    "mup": ("Llama", MUP),
    "mup_tied": ("Llama", {**MUP, "tied_embeddings": True}),
    "mup_qk_norm": ("Qwen3", {**MUP, "qk_norm": True}),
}  # fmt: skip
MERGED: dict[str, tuple[str, dict[str, Any]]] = {
    "low_rank": ("Llama", linear(kind="low_rank", rank=5)),
    "linear_cola": ("Llama", linear(kind="cola", rank=5, activation="identity")),
    "linear_lost": ("Llama", linear(**{**LOST, "activation": "identity"})),
    "lost_columns": ("Llama", linear(kind="lost", rank=5, gamma=0.0, column_fraction=0.2)),
    "column_sparse": ("Llama", linear(kind="column_sparse", column_fraction=0.3)),
    "sltrain": ("Llama", linear(**SLTRAIN)),
    "sltrain_odd_qk_norm": ("Qwen3", {**linear(**SLTRAIN), "qk_norm": True, "head_dim": 6}),
    "magnitude_pruned": ("Llama", linear(kind="magnitude_pruned", sparsity=0.5, mask_from="nowhere")),
}
CUSTOM: dict[str, tuple[str, dict[str, Any]]] = {
    "cola": ("Llama", linear(kind="cola", rank=5)),
    "gelu_cola": ("Qwen3", {**linear(kind="cola", rank=5, activation="gelu"), "qk_norm": True}),
    "relu_cola": ("Mistral", {**linear(kind="cola", rank=5, activation="relu"), "heads": 6, "kv_heads": 2,
                              "head_dim": 4}),
    "lost": ("Llama", {**linear(**LOST), "tied_embeddings": True}),
    "mixed": ("Llama", {"linear": [
        {"kind": "cola", "rank": 4, "modules": ["feed_forward.*"], "layers": "1"},
        {**SLTRAIN, "modules": ["attention.*"]},
    ]}),
}  # fmt: skip
ALL = {**DENSE, **MERGED, **CUSTOM}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of each model, and a data set's tokenizer."""
    folder = tmp_path_factory.mktemp("exports")
    write_tokenizer(folder / "data")
    run_on_ranks(save_checkpoints, 1, folder, {name: model for name, (_, model) in ALL.items()})
    return folder


def checkpoint(root: Path, name: str) -> Path:
    return root / name / "step_000000000"


def their_logits(folder: Path, custom: bool = False, **options: Any) -> Tensor:
    """Logits [T, V] of TEXT by transformers alone, its tokenizer included."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == TOKENIZER.encode(TEXT)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=custom, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    with torch.no_grad():
        logits: Tensor = model(ids).logits[0].float()
    return logits


@pytest.mark.parametrize("name", ALL)
def test_logits_are_equal(root: Path, tmp_path: Path, name: str) -> None:
    written = export_checkpoint(checkpoint(root, name), tmp_path / "out")
    custom = name in CUSTOM
    assert written.architecture == f"{'Headrace' if custom else ''}{ALL[name][0]}ForCausalLM"
    assert (written.merged_layers > 0, written.custom_layers > 0) == (name in MERGED or name == "mixed", custom)
    ours = our_logits(CheckpointWeights(checkpoint(root, name)), TOKENIZER.encode(TEXT))
    theirs = their_logits(tmp_path / "out", custom)
    assert spread(ours) > 0.5
    print(name, spread(ours), float((ours - theirs).abs().max()))
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
