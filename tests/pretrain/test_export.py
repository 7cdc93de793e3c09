"""What `pretrain export` writes computes, in transformers, what the checkpoint computes here."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.errors import DataError, HeadraceError, UserError
from data_pipeline.testing import tiny_tokenizer
from pretrain.export.export import export_checkpoint
from pretrain.export.write import Planned, published, write_tensors
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
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=custom)
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
    assert spread(ours) > 0.5
    torch.testing.assert_close(their_logits(tmp_path / "out", custom), ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*MERGED, *CUSTOM])
def test_logits_of_unmerged_layers_are_equal(root: Path, tmp_path: Path, name: str) -> None:
    written = export_checkpoint(checkpoint(root, name), tmp_path / "out", unmerged=True)
    weights = CheckpointWeights(checkpoint(root, name))
    assert written.merged_layers == 0
    assert written.parameters == sum(tensor.numel() for tensor in weights.outline.values() if tensor.requires_grad)
    ours = our_logits(weights, TOKENIZER.encode(TEXT))
    torch.testing.assert_close(their_logits(tmp_path / "out", custom=True), ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "unmerged"), [("tied", False), ("sltrain", False), ("sltrain", True), ("lost", True)])
def test_bf16_is_the_rounded_weights(root: Path, tmp_path: Path, name: str, unmerged: bool) -> None:
    """Each tensor is that of the fp32 export, rounded; so a model that loads them in fp32 loses nothing else."""
    for dtype in ("fp32", "bf16"):
        export_checkpoint(checkpoint(root, name), tmp_path / dtype, dtype=dtype, unmerged=unmerged)  # type: ignore[arg-type]
    whole, rounded = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("fp32", "bf16"))
    assert whole.keys() == rounded.keys()
    for tensor, value in whole.items():
        expected = value.bfloat16() if value.is_floating_point() else value
        assert torch.equal(rounded[tensor], expected), tensor
        assert rounded[tensor].dtype == expected.dtype
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", trust_remote_code=unmerged)
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    exact = their_logits(tmp_path / "bf16", custom=unmerged, dtype=torch.float32)
    difference = (exact - their_logits(tmp_path / "fp32", custom=unmerged)).abs().max()
    assert 1e-4 < float(difference) / spread(exact) < 0.1


def test_a_custom_model_needs_its_code_and_keeps_it(root: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint(root, "lost"), tmp_path / "out")
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True).save_pretrained(
        tmp_path / "again"
    )
    assert torch.equal(their_logits(tmp_path / "again", custom=True), their_logits(tmp_path / "out", custom=True))
    generated = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 7)


def test_shards_have_an_index(root: Path, tmp_path: Path) -> None:
    whole = export_checkpoint(checkpoint(root, "plain"), tmp_path / "one")
    parts = export_checkpoint(checkpoint(root, "plain"), tmp_path / "many", max_shard_size="30KB")
    assert parts._replace(output="") == whole._replace(output="")
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert index["metadata"]["total_size"] == whole.bytes == whole.parameters * 4
    together = {name: value for file in files for name, value in load_file(tmp_path / "many" / file).items()}
    one = load_file(tmp_path / "one/model.safetensors")
    assert together.keys() == one.keys()
    assert all(torch.equal(together[name], value) for name, value in one.items())
    assert torch.equal(their_logits(tmp_path / "many"), their_logits(tmp_path / "one"))


def test_what_the_folder_says(root: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint(root, "rounded_vocabulary"), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 2, 3)
    assert (config.vocab_size, config.max_position_embeddings) == (384, 128)
    plain = json.loads((tmp_path / "out/config.json").read_text())  # either is enough for transformers 5
    assert plain["rope_theta"] == plain["rope_parameters"]["rope_theta"] == 10_000.0
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (None, 2, 3)
    assert (tmp_path / "out/tokenizer.model").read_bytes() == TOKENIZER.model
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


def test_an_empty_folder_may_be_filled_and_no_other(root: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    export_checkpoint(checkpoint(root, "plain"), tmp_path / "empty")
    (tmp_path / "file").touch()
    for taken in ("empty", "file"):
        with pytest.raises(UserError, match=f"{taken} exists already"):
            export_checkpoint(checkpoint(root, "plain"), tmp_path / taken)
        with pytest.raises(UserError, match="exists already"), published(tmp_path / taken):
            pytest.fail("before any work")
    assert len(list((tmp_path / "empty").iterdir())) == 6


def test_a_failed_export_leaves_nothing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full at the second file; then a leftover of a killed export is in the way."""
    whole, calls = safetensors.torch.save_file, []

    def full(content: Any, path: Path, **options: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(content, path, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(HeadraceError, match=r"out could not be written: .*No space left"):
        export_checkpoint(checkpoint(root, "plain"), tmp_path / "out", max_shard_size="30KB")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / ".exporting_out").mkdir()
    (tmp_path / ".exporting_out/model-00007-of-00009.safetensors").touch()
    export_checkpoint(checkpoint(root, "plain"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(list((tmp_path / "out").iterdir())) == 6


def test_an_output_that_can_not_be_made_and_no_size(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/out can't be made: Not a directory"):
        export_checkpoint(checkpoint(root, "plain"), tmp_path / "file" / "out")
    with pytest.raises(UserError, match="--max-shard-size 'large' is no size"):
        export_checkpoint(checkpoint(root, "plain"), tmp_path / "out", max_shard_size="large")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_error_of_the_disk_inside_safetensors_is_one(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file or directory"):
        write_tensors(tmp_path / "gone", {"name": Planned((2,), torch.float32, lambda: torch.ones(2))}, "5GB")


def test_two_exports_at_once_do_not_mix(root: Path, tmp_path: Path) -> None:
    with published(tmp_path / "out"), pytest.raises(UserError, match="is being written by another export"):
        export_checkpoint(checkpoint(root, "plain"), tmp_path / "out")


def test_every_file_is_flushed_before_the_folder_appears(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    flush, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda handle: (done.append(os.readlink(f"/proc/self/fd/{handle}")), flush(handle))
    )
    monkeypatch.setattr(os, "rename", lambda one, other: (done.append(f"rename {other}"), rename(one, other)))
    export_checkpoint(checkpoint(root, "plain"), tmp_path / "out")
    draft = tmp_path / ".exporting_out"
    before = done[: done.index(f"rename {tmp_path / 'out'}")]
    assert {str(draft), *(str(draft / path.name) for path in (tmp_path / "out").iterdir())} <= set(before)
    assert done[-1] == str(tmp_path)


def test_a_run_folder_stands_for_its_newest_checkpoint(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").touch()
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        export_checkpoint(run, tmp_path / "out")
    newest = run / "checkpoints" / "step_000000000"
    shutil.copytree(checkpoint(root, "plain"), newest)
    assert export_checkpoint(run, tmp_path / "out").checkpoint == str(newest)


def test_no_checkpoint_and_a_damaged_one_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no complete checkpoint"):
        export_checkpoint(tmp_path, tmp_path / "out")
    shutil.copytree(checkpoint(root, "plain"), tmp_path / "step")
    (tmp_path / "step/rank_00000.pt").write_bytes(b"")
    with pytest.raises(DataError, match="damaged"):
        export_checkpoint(tmp_path / "step", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_where_the_data_is_gone(root: Path, tmp_path: Path) -> None:
    run_on_ranks(save_checkpoints, 1, tmp_path / "moved", {"plain": {}})
    there = checkpoint(tmp_path / "moved", "plain")
    with pytest.raises(UserError, match=r"is not to be had.*--tokenizer, or leave it out by --no-tokenizer"):
        export_checkpoint(there, tmp_path / "out")
    assert export_checkpoint(there, tmp_path / "bare", tokenizer="none").bytes
    assert not list((tmp_path / "bare").glob("tokenizer*"))
    (tmp_path / "other.model").write_bytes(tiny_tokenizer(310).model)
    with pytest.raises(UserError, match=r"is not the tokenizer that .* was trained with"):
        export_checkpoint(there, tmp_path / "out", tokenizer=tmp_path / "other.model")
    (tmp_path / "same.model").write_bytes(TOKENIZER.model)
    export_checkpoint(there, tmp_path / "out", tokenizer=tmp_path / "same.model")
    assert (tmp_path / "out/tokenizer.json").is_file()
