"""Checkpoints with random weights of many models, and their logits: for the tests of export and import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline import Tokenizer
from data_pipeline.layout import TOKENIZER_FILE
from data_pipeline.testing import tiny_tokenizer
from pretrain.config import Config
from pretrain.initial_weights import Weights, open_weights, outline
from pretrain.model import Decoder
from pretrain.model.initialize import normal
from pretrain.run_folder import plain
from pretrain.state import FORMAT

from .steps import tiny_config

TOKENIZER = tiny_tokenizer()
TEXT = "def dog(fox):\n    return the_lazy_dog  # and then it sleeps: again </s> \u2581\u00e9\n" * 2


class RandomWeights:
    """Values that no rule of initialisation gives, so that no tensor can stand for another or be left out."""

    def __init__(self, config: Config, seed: int) -> None:
        self.seed = seed
        self.outline = outline(config.model, vocab_size(config))
        self.shapes = {name: tuple(each.shape) for name, each in self.outline.items() if not name.endswith("columns")}
        self.shapes = {name: shape for name, shape in self.shapes.items() if not name.endswith("positions")}

    def read(self, name: str) -> Tensor:
        values = normal(name, self.shapes[name], 1.0, self.seed)
        if name.endswith("mask"):
            return values > 0
        if "norm" in name:
            return 1.0 + 0.3 * values
        return values * (1.0 if name == "embedding.weight" else 0.15)


def vocab_size(config: Config) -> int:
    return config.model.resolve_vocab_size(TOKENIZER.vocab_size)


def config_of(model: dict[str, Any], data: Path | str = "nowhere", **sections: dict[str, Any]) -> Config:
    """A tiny run of the tiny tokenizer's vocabulary, whose data set is ``data``."""
    sections["data"] = {"sources": {"a": {"path": str(data)}}, "seq_len": 128}
    return tiny_config(model={"vocab_size": None, "init_std": 0.02, **model}, **sections)


def write_tokenizer(folder: Path) -> Tokenizer:
    """What a data set has of a tokenizer."""
    folder.mkdir(exist_ok=True)
    (folder / TOKENIZER_FILE).write_bytes(TOKENIZER.model)
    return TOKENIZER


def save_checkpoints(folder: Path, models: dict[str, dict[str, Any]], **sections: dict[str, Any]) -> None:
    """On one rank: ``folder/NAME/step_000000000``, each saved by another ZeRO stage.

    The weights are random, or those of the model's ``weights_from``.
    """
    from pretrain.checkpoint import CheckpointStore
    from pretrain.distributed import start
    from pretrain.engine import Engine

    ranks = start(60)
    for number, (name, model) in enumerate(models.items()):
        config = config_of(model, folder / "data", engine={"zero_stage": number % 4}, **sections)
        weights = open_weights(config, TOKENIZER) or RandomWeights(config, seed=number)
        engine = Engine(config, vocab_size(config), ranks, weights)
        state = {
            "format": FORMAT,
            "step": 0,
            "config": plain(config),
            "model": {"vocab_size": vocab_size(config)},
            "data": {"tokenizer": TOKENIZER.sha256},
        }
        CheckpointStore(folder / name, config.checkpoint, ranks).save(engine, state)


def our_logits(weights: Weights, tokens: list[int]) -> Tensor:
    """Logits [T, V] of one document, in fp32."""
    model = Decoder(weights.settings, weights.shapes["embedding.weight"][0])
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.copy_(weights.read(name))
        row = torch.tensor([tokens])
        logits: Tensor = model(row, torch.arange(len(tokens))[None], torch.zeros_like(row), single_document=True)[0]
    return logits


def spread(logits: Tensor) -> float:
    """Standard deviation, to compare a tolerance with."""
    return float(np.std(logits.numpy()))
