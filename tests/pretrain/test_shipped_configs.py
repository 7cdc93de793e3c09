"""Every shipped YAML file builds: the configuration, the model on the meta device, DeepSpeed's configuration."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import UserError
from pretrain.config import load_config
from pretrain.engine import accumulation_steps, check_zero_settings, deepspeed_config
from pretrain.model import Decoder, parameter_shapes
from pretrain.model.mup import width_scaling
from pretrain.optimizer import check_schedule, parameter_groups

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
PARAMETERS = {
    "llama_60m": 58.07,
    "llama_60m_mup": 58.07,
    "llama_60m_muon": 58.07,
    "llama_60m_galore": 58.07,
    "llama_130m": 134.11,
    "llama_1b": 1339.08,
    "llama_7b": 6738.42,
    **{f"llama_60m_{kind}": millions for kind, millions in (("low_rank", 42.77), ("cola", 42.77), ("lost", 43.02))},
    **{f"llama_130m_{kind}": millions for kind, millions in (("low_rank", 94.00), ("cola", 94.00), ("lost", 94.78))},
    **{f"llama_{size}_sltrain": millions for size, millions in (("60m", 43.53), ("130m", 96.55), ("1b", 645.55))},
    **{f"llama_1b_{kind}": millions for kind, millions in (("low_rank", 609.31), ("cola", 609.31), ("lost", 621.14))},
}


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_builds(path: Path) -> None:
    config = load_config(path)
    check_schedule(config.schedule, config.total_steps)
    vocabulary = config.model.resolve_vocab_size(4096 if config.model.vocab_size is None else 32000)
    with torch.device("meta"):
        model = Decoder(config.model, vocabulary, config.training.activation_checkpointing)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    if path.stem in PARAMETERS:
        assert round(millions, 2) == PARAMETERS[path.stem]
    scaling = partial(width_scaling, settings=config.model, rate=config.optimizer.mup_rate)
    groups = parameter_groups(model.named_parameters(), config.optimizer, scaling)
    # with and without weight decay; muP and optimizers of matrices part the hidden matrices from the head
    assert len(groups) == (3 if config.model.mup or any(group["matrix"] for group in groups) else 2)
    config.optimizer.check(config, parameter_shapes(config.model, vocabulary))
    for ranks in (1, 2, 8):
        if config.training.global_batch % (config.training.micro_batch * ranks) == 0:
            made = deepspeed_config(config, ranks)
            together = made["train_micro_batch_size_per_gpu"] * made["gradient_accumulation_steps"] * ranks
            assert together == config.training.global_batch


def test_deepspeed_keys_pass_through_and_contradictions_are_refused() -> None:
    demo = Path(__file__).parents[2] / "configs/demo.yaml"
    passed = load_config(
        demo, ["engine.deepspeed={wall_clock_breakdown: true, zero_optimization: {sub_group_size: 5}}"]
    )
    made = deepspeed_config(passed, 2)
    assert made["wall_clock_breakdown"] is True
    assert made["zero_optimization"]["sub_group_size"] == 5
    assert made["zero_optimization"]["stage"] == 2
    for contradiction, key in [
        ("{zero_optimization: {stage: 3}}", "engine.deepspeed.zero_optimization.stage = 3"),
        ("{gradient_clipping: 2.0}", "engine.deepspeed.gradient_clipping = 2.0"),
        ("{fp16: {enabled: true}}", "engine.deepspeed.fp16"),
        (
            "{zero_optimization: {round_robin_gradients: true}}",
            "engine.deepspeed.zero_optimization.round_robin_gradients = True: with it, DeepSpeed 0.19.8 takes",
        ),
        ("{train_batch_size: 8}", "engine.deepspeed.train_batch_size = 8"),
        ("{managed_gradient_accumulation: false}", "engine.deepspeed.managed_gradient_accumulation is not passed"),
        ("{wall_clock_breakdwn: true}", "did you mean 'wall_clock_breakdown'"),
    ]:
        with pytest.raises(UserError, match=key.replace(".", r"\.")):
            deepspeed_config(load_config(demo, [f"engine.deepspeed={contradiction}"]), 2)


def test_a_batch_that_does_not_divide_names_the_ranks_that_fit() -> None:
    config = load_config(Path(__file__).parents[2] / "configs/demo.yaml", ["training.global_batch=24"])
    with pytest.raises(UserError, match=r"global_batch = 24 .* micro_batch 8 x 2 ranks = 16.*these.* 1, 3"):
        accumulation_steps(config, 2)


def test_a_misspelt_zero_key_is_refused_before_the_run() -> None:
    demo = Path(__file__).parents[2] / "configs/demo.yaml"
    config = load_config(demo, ["engine.deepspeed={zero_optimization: {reduce_scater: true}}"])
    with pytest.raises(UserError, match="reduce_scater"):
        check_zero_settings(deepspeed_config(config, 2))
