"""Weights that transformers saved: our decoder computes the same with them, or they are refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from data_pipeline.errors import DataError, UserError
from data_pipeline.testing import tiny_tokenizer
from pretrain.export.export import export_checkpoint
from pretrain.export.read import FolderWeights
from pretrain.initial_weights import open_weights
from tests.ranks import run_on_ranks

from .exports import TEXT, TOKENIZER, config_of, our_logits, save_checkpoints, spread, write_tokenizer

SHAPE = {"vocab_size": TOKENIZER.vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-3}  # fmt: skip
OURS = {"norm_eps": 1e-3}
MODELS: dict[str, tuple[transformers.PreTrainedConfig, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig(**SHAPE, rope_theta=700.0), {"rope_theta": 700.0}),
    "tied": (transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True), {"tied_embeddings": True}),
    "qwen3": (transformers.Qwen3Config(**SHAPE), {"qk_norm": True}),
    "mistral": (transformers.MistralConfig(**SHAPE, sliding_window=None), {}),
}  # fmt: skip


def save(config: transformers.PreTrainedConfig, folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    """A random model of transformers, with norms' gains that are not 1."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn_like(parameter) * (0.3 if "norm" in name else 0.15) + (
            1.0 if "norm" in name else 0
        )
    model.to(dtype).save_pretrained(folder, **options)
    # not model.float(): the frequencies of the rotary embedding would stay rounded
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("dtype", "shards"), [(torch.float32, "5GB"), (torch.bfloat16, "20KB"), (torch.float16, "20KB")]
)
@pytest.mark.parametrize("name", MODELS)
def test_our_decoder_computes_the_same(name: str, dtype: torch.dtype, shards: str, tmp_path: Path) -> None:
    theirs, settings = MODELS[name]
    model = save(theirs, tmp_path, dtype, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "20KB")
    weights = open_weights(config_of({**OURS, **settings, "weights_from": str(tmp_path)}), TOKENIZER)
    assert isinstance(weights, FolderWeights)
    ids = TOKENIZER.encode(TEXT)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    assert spread(expected) > 0.5
    torch.testing.assert_close(our_logits(weights, ids), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "llama"
    save(MODELS["llama"][0], folder, torch.float32)
    return folder


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    shutil.copytree(llama, tmp_path / "copy")
    return tmp_path / "copy"


def opened(folder: Path, **model: Any) -> FolderWeights:
    settings = {**OURS, "rope_theta": 700.0, "weights_from": str(folder), **model}
    weights = open_weights(config_of(settings), TOKENIZER)
    assert isinstance(weights, FolderWeights)
    return weights


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content.pop(key, None)
        if value is not None:
            content[key] = value
    path.write_text(json.dumps(content))


def test_a_config_of_transformers_4_and_its_extra_tensors(copy: Path) -> None:
    edit(copy / "config.json", rope_parameters=None, rope_theta=700.0, head_dim=None, rope_scaling=None)
    content = load_file(copy / "model.safetensors")
    content["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(content, copy / "model.safetensors")
    weights = opened(copy)
    assert not any("rotary" in name for name in weights.shapes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"attention_bias": True}, "attention_bias is true, a decoder has no bias"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 700.0}}, "rope_scaling is"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_scaling is"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is"),
        ({"partial_rotary_factor": 0.5}, "rope_scaling is"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding_window is 64"),
        ({"model_type": "mistral"}, "sliding_window is 4096"),
        ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 32}, "sliding_window is 32"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types are"),
        ({"quantization_config": {"bits": 4}}, "the weights are quantised"),
        ({"hidden_size": None, "vocab_size": None}, "lacks hidden_size, vocab_size"),
        ({"hidden_size": "32"}, "lacks hidden_size"),
        ({"num_key_value_heads": 3}, "heads 4 is not a multiple of kv_heads 3"),
        ({"rms_norm_eps": 1e-6}, "model.norm_eps is 1e-06 there and 0.001 here"),
        ({"rope_parameters": None}, "model.rope_theta is 10000.0 there and 700.0 here"),
        ({"num_attention_heads": 8, "head_dim": 4}, "model.heads is 4 there and 8 here"),
    ],
)
def test_what_a_decoder_does_not_compute_is_refused(copy: Path, changes: dict[str, Any], reason: str) -> None:
    edit(copy / "config.json", **changes)
    if "num_attention_heads" in changes:
        reason = "model.heads is 8 there and 4 here"
    with pytest.raises(UserError) as refusal:
        opened(copy)
    assert reason in str(refusal.value)


def test_settings_of_another_model_are_refused(llama: Path) -> None:
    for model, reason in (
        ({"intermediate_size": 64}, "model.intermediate_size is 48 there and 64 here"),
        ({"vocab_size": 304}, r"embedding.weight is [300, 32] there and [304, 32] here"),
        ({"linear": [{"kind": "low_rank", "rank": 3, "modules": ["attention.key"]}]},
         "blocks.0.attention.key.a [3, 32] is missing there; blocks.0.attention.key.b [16, 3] is missing there"),
        ({"mup": {"base": {"hidden_size": 16, "heads": 2, "intermediate_size": 24}}},
         "mup multiplies the head by 1 there and by 0.5 here"),
    ):  # fmt: skip
        with pytest.raises(UserError) as refusal:
            opened(llama, **model)
        assert reason in str(refusal.value)


def test_a_dense_weight_may_be_pruned(llama: Path) -> None:
    rule = {"kind": "magnitude_pruned", "sparsity": 0.5, "mask_from": "nowhere"}
    assert "blocks.0.attention.key.mask" not in opened(llama, linear=[rule]).shapes


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def drop_tensor(path: Path) -> None:
    content = load_file(path)
    content.pop("model.norm.weight")
    save_file(content, path)


def add_tensor(path: Path) -> None:
    save_file({**load_file(path), "model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, path)


def quantise(path: Path) -> None:
    content = load_file(path)
    content["model.norm.weight"] = torch.ones(32, dtype=torch.int8)
    save_file(content, path)


@pytest.mark.parametrize(
    ("harm", "error", "reason"),
    [
        (cut, DataError, "model.safetensors can't be read"),
        (lambda path: path.write_bytes(b""), DataError, "model.safetensors can't be read"),
        (drop_tensor, UserError, "norm.weight [32] is missing there"),
        (add_tensor, UserError, "blocks.0.attention.query.bias [32] is only there"),
        (quantise, UserError, "model.norm.weight has the type I8; what can be read is"),
        (lambda path: path.rename(path.with_name("pytorch_model.bin")), UserError,
         "has neither model.safetensors nor model.safetensors.index.json (it has pytorch_model.bin)"),
        (lambda path: path.with_name("config.json").write_text("{"), DataError, "config.json can't be read"),
        (lambda path: path.with_name("config.json").write_text("[]"), DataError, "holds no JSON object"),
        (lambda path: path.with_name("config.json").unlink(), UserError, "holds no weights"),
    ],
)  # fmt: skip
def test_harm_is_named(copy: Path, harm: Callable[[Path], Any], error: type[UserError], reason: str) -> None:
    harm(copy / "model.safetensors")
    with pytest.raises(error) as refusal:
        opened(copy)
    assert reason in str(refusal.value)


def test_a_missing_shard_and_a_wrong_index_are_named(tmp_path: Path) -> None:
    save(MODELS["llama"][0], tmp_path, torch.float32, max_shard_size="30KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    index = tmp_path / "model.safetensors.index.json"
    whole = index.read_text()
    content = json.loads(whole)
    content["weight_map"]["model.layers.9.input_layernorm.weight"] = shards[0].name
    index.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"layers.9.input_layernorm.weight is not in the file that"):
        opened(tmp_path)
    index.write_text('{"metadata": {}}')
    with pytest.raises(DataError, match="has no weight_map"):
        opened(tmp_path)
    index.write_text(whole)
    assert opened(tmp_path)
    shards[1].unlink()
    with pytest.raises(DataError, match=f"{shards[1].name} is missing"):
        opened(tmp_path)


def test_another_tokenizer_is_refused(copy: Path) -> None:
    (copy / "tokenizer.model").write_bytes(tiny_tokenizer(299).model)
    with pytest.raises(UserError, match=r"has another tokenizer than the data's: token 272 is '\u2581' there and"):
        opened(copy)
    (copy / "tokenizer.model").unlink()
    vocabulary = {TOKENIZER.piece(number): number for number in range(TOKENIZER.vocab_size)}
    kept = {"model": {"vocab": vocabulary}, "added_tokens": []}
    (copy / "tokenizer.json").write_text(json.dumps(kept))
    assert opened(copy)
    vocabulary["again"], vocabulary["\u2581the"] = vocabulary.pop("\u2581the"), 299
    (copy / "tokenizer.json").write_text(json.dumps(kept))
    with pytest.raises(UserError, match=r"token \d+ is 'again' there and '\u2581the' here"):
        opened(copy)


@pytest.mark.parametrize("content", ["{}", '{"model": {"vocab": 3}}', '{"model": {"vocab": {}}}', "[", "[]"])
def test_a_damaged_tokenizer_is_told(copy: Path, content: str) -> None:
    (copy / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer.json (has no vocabulary|can't be read|holds no JSON object)"):
        opened(copy)


def test_the_identity_is_that_of_the_weights(copy: Path) -> None:
    content = load_file(copy / "model.safetensors")
    save_file(content, copy / "model.safetensors")
    before = opened(copy).identity()
    (copy / "README.md").touch()
    assert opened(copy).identity() == before
    content["lm_head.weight"][0, 0] += 1.0
    save_file(content, copy / "model.safetensors")
    assert opened(copy).identity() != before


ROUND_TRIPS: dict[str, dict[str, Any]] = {
    "dense": {"kv_heads": 2},
    "tied_qk_norm": {"tied_embeddings": True, "qk_norm": True},
    "sltrain": {"linear": [{"kind": "sltrain", "rank": 4, "alpha": 8.0}]},
    "mixed": {"linear": [
        {"kind": "lost", "rank": 4, "modules": ["attention.*"], "layers": "1"},
        {"kind": "magnitude_pruned", "sparsity": 0.3, "mask_from": "nowhere", "modules": ["feed_forward.down"]},
    ]},
}  # fmt: skip


def test_an_export_of_an_import_is_the_same(tmp_path: Path) -> None:
    """Export, start runs with it at four ZeRO stages and in bf16, export those: the same tensors bit for bit."""
    write_tokenizer(tmp_path / "data")
    run_on_ranks(save_checkpoints, 1, tmp_path, ROUND_TRIPS)
    for name in ROUND_TRIPS:
        export_checkpoint(tmp_path / name / "step_000000000", tmp_path / f"{name}-out", unmerged=True)
    again = {
        f"{name}-again": {**model, "weights_from": str(tmp_path / f"{name}-out")} for name, model in ROUND_TRIPS.items()
    }
    run_on_ranks(save_bf16, 1, tmp_path, again)
    for name in ROUND_TRIPS:
        export_checkpoint(tmp_path / f"{name}-again/step_000000000", tmp_path / f"{name}-2", unmerged=True)
        one, two = (load_file(tmp_path / f"{name}-{each}" / "model.safetensors") for each in ("out", "2"))
        assert one.keys() == two.keys()
        for tensor, value in one.items():
            assert torch.equal(two[tensor], value), (name, tensor)
            assert two[tensor].dtype == value.dtype
        configs = [(tmp_path / f"{name}-{each}" / "config.json").read_text() for each in ("out", "2")]
        assert configs[0] == configs[1]


def save_bf16(folder: Path, models: dict[str, dict[str, Any]]) -> None:
    save_checkpoints(folder, models, training={"precision": "bf16"})
