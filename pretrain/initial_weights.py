"""Initial weights from elsewhere: of a checkpoint, by the decoder's names, one tensor at a time.

A run without ``model.weights_from`` draws its initial weights (:mod:`pretrain.model.initialize`). With it, rank 0 opens
what it names, checks it against the run's model and reads each parameter when the engine fills it in; the other ranks
get it from rank 0. A resumed run never comes here: its weights are its checkpoint's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from data_pipeline import Tokenizer
from data_pipeline.errors import UserError
from data_pipeline.files import sha256_file
from data_pipeline.settings import build_settings

from .checkpoint import intact, read_manifest, read_state
from .checkpoint.manifest import NAME as MANIFEST_NAME
from .config import Config
from .engine.weights import StoredTensor, stored_weights
from .model import Decoder, ModelSettings
from .model.linear import block_shapes, method_of

Shapes = dict[str, tuple[int, ...]]


class Weights(Protocol):
    """A model's parameters and buffers, by the names that a :class:`Decoder` gives them."""

    path: Path
    shapes: Shapes
    """Of everything that can be read."""

    def read(self, name: str) -> Tensor:
        """One tensor, whole, on the CPU; floating-point values in fp32 or narrower."""

    def identity(self) -> str:
        """Hex SHA-256 that stands for every byte of the weights."""


class CheckpointWeights:
    """The weights of a complete checkpoint of ours, whatever topology saved it.

    Args:
        path: a ``step_...`` folder.

    Raises:
        UserError: it is no complete checkpoint, or one whose settings this version does not know.
        DataError: a file of it is not as it was saved.
    """

    def __init__(self, path: Path) -> None:
        intact(path)
        self.path = path
        saved = read_state(path)
        self.settings = build_settings(ModelSettings, saved["config"]["model"], str(path / "state.json"))
        self.tokenizer_sha256: str = saved["data"]["tokenizer"]
        self.shapes = shapes_of(self.settings, saved["model"]["vocab_size"])

    @cached_property
    def _stored(self) -> Mapping[str, StoredTensor]:
        return stored_weights(self.path)

    def read(self, name: str) -> Tensor:
        return self._stored[name].contiguous()

    def identity(self) -> str:
        return sha256_file(self.path / MANIFEST_NAME)


def open_weights(config: Config, tokenizer: Tokenizer) -> Weights | None:
    """What ``model.weights_from`` names, checked against the run's model and tokenizer; None where it names nothing.

    Raises:
        UserError: it holds no weights, or those of another model: says which settings differ.
        DataError: they are damaged.
    """
    if config.model.weights_from is None:
        return None
    path = Path(config.model.weights_from)
    if read_manifest(path) is None:
        raise UserError(
            f"model.weights_from = {str(path)!r} is no complete checkpoint. Give a step_... folder of a run."
        )
    weights = CheckpointWeights(path)
    if weights.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"model.weights_from = {str(path)!r} was trained with another tokenizer than the data's: "
            f"{weights.tokenizer_sha256[:12]} there and {tokenizer.sha256[:12]} here, so its embedding means other "
            "tokens. Prepare the data with its tokenizer."
        )
    _check_same_function(weights, config.model)
    check_shapes(weights, config.model, config.model.resolve_vocab_size(tokenizer.vocab_size))
    return weights


def shapes_of(settings: ModelSettings, vocab_size: int) -> Shapes:
    """The shape of each parameter and buffer of a decoder; a tied head is the embedding and not named."""
    with torch.device("meta"):
        model = Decoder(settings, vocab_size)
    return {name: tuple(value.shape) for name, value in (*model.named_parameters(), *model.named_buffers())}


def check_shapes(weights: Weights, settings: ModelSettings, vocab_size: int) -> None:
    """Raise UserError unless ``weights`` has every parameter of the model, in its shape, and nothing beyond it.

    A buffer (an index, a mask) that it lacks starts as in any run.
    """
    with torch.device("meta"):
        model = Decoder(settings, vocab_size)
    here = shapes_of(settings, vocab_size)
    needed = {name for name, _ in model.named_parameters()}
    wrong = [
        f"{name} is {list(weights.shapes[name])} there and {list(here[name])} here"
        for name in here
        if name in weights.shapes and weights.shapes[name] != here[name]
    ]
    wrong += [f"{name} {list(here[name])} is missing there" for name in here if name in needed - weights.shapes.keys()]
    wrong += [f"{name} {list(shape)} is only there" for name, shape in weights.shapes.items() if name not in here]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(
            f"model.weights_from = {str(weights.path)!r} does not fit the model: {'; '.join(wrong[:4])}{more}. Give "
            "the model the shape of these weights, or take others."
        )


_NOT_OF_THE_FUNCTION = {"vocab_size", "init_std", "init_scaled_residual", "linear", "weights_from"}
"""Settings that say how a model starts, and those that are compared in another way."""


def _check_same_function(weights: CheckpointWeights, settings: ModelSettings) -> None:
    """Raise UserError where the model would compute something else with the same weights.

    A dense layer may become one that keeps a whole weight and does something to it, as pruning does: what else it
    could become has other shapes.
    """
    there, here = (
        each.model_dump(exclude=_NOT_OF_THE_FUNCTION)
        | {"kv_heads": each.effective_kv_heads, "head_dim": each.effective_head_dim}
        for each in (weights.settings, settings)
    )
    wrong = [f"model.{key} is {there[key]!r} there and {here[key]!r} here" for key in here if there[key] != here[key]]
    for layer in range(0 if wrong else settings.layers):
        for name in block_shapes(settings):
            methods = [
                method_of(f"blocks.{layer}.{name}", each).model_dump(exclude={"modules", "layers"})
                for each in (weights.settings, settings)
            ]
            if methods[0] != methods[1] and methods[0] != {"kind": "dense"}:
                wrong.append(f"blocks.{layer}.{name} is {methods[0]} there and {methods[1]} here")
    if wrong:
        raise UserError(
            f"model.weights_from = {str(weights.path)!r} is of a model that computes something else: "
            f"{'; '.join(wrong[:4])}. Give the model the same settings, or take other weights."
        )
