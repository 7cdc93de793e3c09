"""Mixtures of experts for transformers and from it: the same logits both ways, or a refusal that names the setting."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from data_pipeline.errors import DataError, UserError
from pretrain.__main__ import app
from pretrain.export.export import export_checkpoint
from pretrain.export.layouts import LAYOUTS, choose_layout
from pretrain.export.names import LayoutName
from pretrain.export.read import FolderWeights
from pretrain.initial_weights import CheckpointWeights, open_weights
from pretrain.model import ModelSettings
from tests.ranks import run_on_ranks

from .exports import TEXT, TOKENIZER, config_of, our_logits, save_checkpoints, spread, write_tokenizer
from .test_export import SLTRAIN, checkpoint, their_logits
from .test_import_transformers import OURS, SHAPE, edit, save

FOUR = {"number": 4, "top_k": 2, "intermediate_size": 12}


def mixture(experts: dict[str, Any] | None = None, **model: Any) -> dict[str, Any]:
    return {**model, "experts": {**FOUR, **(experts or {})}}


OLMOE = {"qk_norm": "all_heads", "kv_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("Mixtral", mixture()),
    "scaled": ("Mixtral", mixture({"scaling": 2.5, "jitter": 0.1, "capacity": {"factor": 1.0}}, heads=6, kv_heads=2,
                                  head_dim=4, linear=[{**SLTRAIN, "modules": ["attention.*"]}])),
    "all_heads": ("Olmoe", mixture({"normalised": False}, **OLMOE)),
    "normalised": ("Olmoe", mixture(**OLMOE, tied_embeddings=True)),
    "shared": ("Qwen2Moe", mixture({"shared": 2, "dense_first": 1, "normalised": False})),
    "qk_norm": ("Qwen3Moe", mixture({"normalised": False}, qk_norm=True, head_dim=14)),
    "some_blocks": ("Qwen3Moe", mixture({"dense_first": 1, "every": 2}, qk_norm=True, layers=4)),
}  # fmt: skip
COLA = mixture(linear=[{"kind": "cola", "rank": 4, "modules": ["attention.*"]}])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of each model, and a data set's tokenizer."""
    folder = tmp_path_factory.mktemp("exports")
    write_tokenizer(folder / "data")
    models = {name: model for name, (_, model) in MODELS.items()}
    biased = mixture({"selection_bias": True}, weights_from=str(folder / "plain/step_000000000"))
    run_on_ranks(save_checkpoints, 1, folder, {**models, "biased": biased, "cola": COLA})
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_equal_there_and_back(root: Path, tmp_path: Path, name: str) -> None:
    layout, model = MODELS[name]
    written = export_checkpoint(checkpoint(root, name), tmp_path / "out", max_shard_size="20KB")
    weights = CheckpointWeights(checkpoint(root, name))
    assert written.architecture == f"{layout}ForCausalLM"
    if "linear" not in model:
        gates = weights.settings.hidden_size * len(weights.settings.expert_layers) if name == "shared" else 0
        assert written.parameters == sum(each.numel() for each in weights.outline.values()) + gates
    ours = our_logits(weights, TOKENIZER.encode(TEXT))
    assert spread(ours) > 0.5
    torch.testing.assert_close(their_logits(tmp_path / "out"), ours, atol=1e-5, rtol=1e-5)
    # what the export says of itself is the same model, with nothing that scales its experts any more
    experts = {**model["experts"], "scaling": 1.0}
    back = config_of({**model, "experts": experts, "linear": [], "weights_from": str(tmp_path / "out")})
    read = open_weights(back, TOKENIZER)
    assert isinstance(read, FolderWeights)
    torch.testing.assert_close(our_logits(read, TOKENIZER.encode(TEXT)), ours, atol=1e-5, rtol=1e-5)


THEIRS: dict[str, tuple[transformers.PreTrainedConfig, dict[str, Any]]] = {
    "mixtral": (
        transformers.MixtralConfig(**{**SHAPE, "intermediate_size": 12}, num_local_experts=4, router_jitter_noise=0.1),
        mixture(rope_theta=1e6),
    ),
    "olmoe": (
        transformers.OlmoeConfig(
            **{**SHAPE, "intermediate_size": 12}, num_experts=4, num_experts_per_tok=2, pad_token_id=None
        ),
        mixture({"normalised": False}, qk_norm="all_heads"),
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig(
            **{**SHAPE, "num_hidden_layers": 3}, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12,
            decoder_sparse_step=2, norm_topk_prob=True,
        ),
        mixture({"dense_first": 1, "every": 2}, qk_norm=True, layers=3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", THEIRS)
def test_our_decoder_computes_what_theirs_does(name: str, tmp_path: Path) -> None:
    """Also where training adds what their files know nothing of: a selection bias, which starts at 0."""
    config, settings = THEIRS[name]
    model = save(config, tmp_path, torch.float32, max_shard_size="20KB")
    settings = {**settings, "experts": {**settings["experts"], "selection_bias": True}}
    training = config_of({**OURS, **settings, "weights_from": str(tmp_path)}, objective={"balancing": {"bias": {}}})
    weights = open_weights(training, TOKENIZER)
    assert isinstance(weights, FolderWeights)
    ids = TOKENIZER.encode(TEXT)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    assert spread(expected) > 0.5
    torch.testing.assert_close(our_logits(weights, ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (mixture({"shared": 1}, qk_norm=True), "qwen3_moe: model.experts.shared is 1, there no expert is shared"),
        (mixture({"normalised": False}), "qwen2_moe: model.experts.shared is 0, there an expert is shared"),
        (mixture({"score": "sigmoid"}), "model.experts.score is sigmoid, there it is softmax"),
        (mixture({"groups": {"number": 2, "kept": 1}}), "model.experts.groups bound a token"),
        (mixture({"routing": "expert_choice", "normalised": False}), "model.experts.routing is expert_choice"),
        (mixture({"normalised": False}), "mixtral: model.experts.normalised is false, there a token's weights sum"),
        (mixture({"normalised": False}), "qwen3_moe: model.qk_norm is false, there it is true"),
        (mixture({"dense_first": 1}), "mixtral: block 0 has no experts (model.experts.dense_first, every)"),
        (mixture(**OLMOE, head_dim=14), "olmoe: model.head_dim is 14, there it is hidden_size / heads"),
        ({"qk_norm": "all_heads"}, "qwen3: model.qk_norm is all_heads, there it is true"),
    ],
)  # fmt: skip
def test_what_no_layout_can_say_is_refused(model: dict[str, Any], reason: str) -> None:
    settings = config_of({"hidden_size": 32, "heads": 4, "intermediate_size": 48, **model}).model
    with pytest.raises(UserError) as refusal:
        choose_layout(settings)
    assert "can't be exported in any layout of transformers" in str(refusal.value)
    assert reason in str(refusal.value)


def test_a_layout_that_is_asked_for_is_taken_or_refused(root: Path, tmp_path: Path) -> None:
    assert export_checkpoint(checkpoint(root, "plain"), tmp_path / "out", layout="mixtral").bytes
    dense = ModelSettings(hidden_size=32, layers=2, heads=4, intermediate_size=48)
    assert [choose_layout(dense), choose_layout(dense, "mistral")] == ["llama", "mistral"]
    refused: tuple[tuple[LayoutName, str], ...] = (
        ("qwen3_moe", "qwen3_moe: model.qk_norm is false, there it is true"),
        ("llama", "llama: model.experts is given, and it has none"),
    )
    for layout, reason in refused:
        with pytest.raises(UserError) as refusal:
            export_checkpoint(checkpoint(root, "plain"), tmp_path / "other", layout=layout)
        assert str(refusal.value).startswith("the model can't be exported in the layout that was asked for. " + reason)
    with pytest.raises(UserError, match=r"mixtral: model.experts is null, and it has them"):
        choose_layout(dense, "mixtral")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_selection_bias_that_never_moved_is_nothing_and_another_is_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = export_checkpoint(checkpoint(root, "plain"), tmp_path / "without")
    written = export_checkpoint(checkpoint(root, "biased"), tmp_path / "biased")
    assert written.bytes == without.bytes
    read = CheckpointWeights.read
    moved = "blocks.1.feed_forward.router.selection_bias"
    monkeypatch.setattr(
        CheckpointWeights, "read", lambda weights, name: read(weights, name) - (0.25 if name == moved else 0.0)
    )
    with pytest.raises(
        UserError, match=rf"{moved} \(model.experts.selection_bias\) is not 0, up to 0.25,.*not by bias; go on from"
    ):
        export_checkpoint(checkpoint(root, "biased"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_layer_in_parts_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is cola \(model.linear\), which no dense weight stands for"):
        export_checkpoint(checkpoint(root, "cola"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs") / "mixtral"
    save(THEIRS["mixtral"][0], folder, torch.float32)
    return folder


def opened(folder: Path, **experts: Any) -> FolderWeights:
    model = {**OURS, **mixture(experts, rope_theta=1e6), "weights_from": str(folder)}
    weights = open_weights(config_of(model), TOKENIZER)
    assert isinstance(weights, FolderWeights)
    return weights


QWEN2 = {"model_type": "qwen2_moe", "qkv_bias": False, "moe_intermediate_size": 12}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_local_experts": None}, "lacks num_local_experts"),
        ({"num_local_experts": 3}, "has the experts [3], beyond 3 of blocks.0.feed_forward.experts"),
        ({"num_local_experts": 5}, "lacks the experts [4] of blocks.0.feed_forward.experts"),
        ({"num_experts_per_tok": 3}, "model.experts.top_k is 3 there and 2 here"),
        ({"sliding_window": 64}, "sliding_window is 64"),
        ({"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ({"model_type": "deepseek_v3"}, "model_type is 'deepseek_v3'"),
        ({**QWEN2, "shared_expert_intermediate_size": 18}, "shared_expert_intermediate_size is 18"),
        ({**QWEN2, "shared_expert_intermediate_size": 12, "qkv_bias": True}, "qkv_bias is true"),
        ({"model_type": "llama"}, "model.experts is None there and 'in the blocks [0, 1]' here"),
        ({"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 12, "num_hidden_layers": 4,
          "mlp_only_layers": [2]}, "has experts in the blocks [0, 1, 3] of 4"),
    ],
)  # fmt: skip
def test_another_mixture_is_refused(mixtral: Path, tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    shutil.copytree(mixtral, tmp_path / "copy")
    edit(tmp_path / "copy/config.json", **changes)
    with pytest.raises(UserError) as refusal:
        opened(tmp_path / "copy")
    assert reason in str(refusal.value)


def test_experts_that_are_lost_or_unlike_are_named(mixtral: Path, tmp_path: Path) -> None:
    shutil.copytree(mixtral, tmp_path / "copy")
    content = load_file(mixtral / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    save_file({**content, name: torch.ones(5, 32)}, tmp_path / "copy/model.safetensors")
    with pytest.raises(
        UserError, match=r"the experts of blocks.1.feed_forward.experts.gate have the shapes \[\(5, 32\)"
    ):
        opened(tmp_path / "copy")
    kept = {key: value for key, value in content.items() if key != name}
    save_file(kept, tmp_path / "copy/model.safetensors")
    with pytest.raises(UserError, match=r"lacks the experts \[2\] of blocks.1.feed_forward.experts.gate"):
        opened(tmp_path / "copy")
    index = {"weight_map": dict.fromkeys(content, "model.safetensors")}
    (tmp_path / "copy/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"experts.2.w1.weight is not in the file that"):
        opened(tmp_path / "copy")


def test_a_shared_expert_has_a_gate_that_must_be_open(root: Path, tmp_path: Path) -> None:
    """Twice its last weights behind a gate of 1/2 are the same to the bit; a gate that hangs on the token is not."""
    export_checkpoint(checkpoint(root, "shared"), tmp_path / "out")
    content = load_file(tmp_path / "out/model.safetensors")
    there = CheckpointWeights(checkpoint(root, "shared"))
    back = FolderWeights(tmp_path / "out")
    name, gate = "blocks.1.feed_forward.shared.down.weight", "model.layers.1.mlp.shared_expert_gate.weight"
    assert torch.equal(content["model.layers.1.mlp.shared_expert.down_proj.weight"], 2 * there.read(name))
    assert torch.equal(back.read(name), there.read(name).float())
    assert back.settings.experts is not None
    assert back.settings.experts.shared == 2
    content[gate][0, 3] = 0.5
    save_file(content, tmp_path / "out/model.safetensors")
    with pytest.raises(UserError, match=rf"{gate} is not 0; a decoder's shared experts have no gate"):
        FolderWeights(tmp_path / "out")


def test_the_command_asks_for_a_layout(root: Path, tmp_path: Path) -> None:
    source, output = str(checkpoint(root, "plain")), str(tmp_path / "out")
    told = CliRunner().invoke(app, ["export", source, output, "--layout", "mixtral", "--json"])
    assert json.loads(told.stdout)["architecture"] == "MixtralForCausalLM"
    assert CliRunner().invoke(app, ["export", source, output, "--layout", "gpt2"]).exit_code == 2


def test_a_run_that_is_exported_and_read_gives_the_same_tensors(root: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint(root, "plain"), tmp_path / "out")
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in load_file(tmp_path / "out/model.safetensors")
    there = CheckpointWeights(checkpoint(root, "plain"))
    back = open_weights(config_of({**MODELS["plain"][1], "weights_from": str(tmp_path / "out")}), TOKENIZER)
    assert back is not None
    assert set(back.shapes) == set(there.shapes)
    assert all(torch.equal(back.read(name), there.read(name).float()) for name in there.shapes)


def test_every_layout_is_one_of_transformers() -> None:
    for name, layout in LAYOUTS.items():
        theirs = getattr(transformers, f"{layout.name}Config")
        assert theirs.model_type == name
        assert hasattr(transformers, f"{layout.name}ForCausalLM")
