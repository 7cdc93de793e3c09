"""Initial weights from elsewhere, by the decoder's names, one tensor at a time.

A run without ``model.weights_from`` draws its initial weights (:mod:`pretrain.model.initialize`). With it, rank 0 opens
what it names, checks it against the run's model and reads each tensor when the engine fills it in; the other ranks get
it from rank 0. A resumed run never comes here: its weights are its checkpoint's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

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
from .export.read import FolderWeights
from .model import Decoder, ModelSettings
from .model.linear import block_shapes, method_of
from .model.linear.terms import DENSE
from .model.mup import forward_multipliers
from .state import FORMAT

_TOLD = 4
"""Differences that a refusal names."""


class Weights(Protocol):
    """A model's parameters and buffers, by the names that a :class:`Decoder` gives them."""

    path: Path
    settings: ModelSettings
    """Of the model whose weights they are."""
    shapes: dict[str, tuple[int, ...]]
    """Of everything that can be read."""

    def read(self, name: str) -> Tensor:
        """One tensor, whole, on the CPU; floating-point values in fp32 or narrower."""

    def identity(self) -> str:
        """Hex SHA-256 that stands for every byte of the weights."""

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises UserError where the rows of the embedding are known to mean other tokens."""


class CheckpointWeights:
    """The weights of a complete checkpoint of ours, whatever topology saved it.

    Attributes:
        config: of the run that saved it.
        vocab_size: rows of its embedding.
        outline: every tensor on the meta device: its shape and type.

    Args:
        path: a ``step_...`` folder.

    Raises:
        UserError: it is no complete checkpoint, or another version's.
        DataError: a file of it is not as it was saved.
    """

    def __init__(self, path: Path) -> None:
        intact(path)
        saved = read_state(path)
        if saved.get("format") != FORMAT:
            raise UserError(f"{path} has the checkpoint format {saved.get('format')!r}, this version reads {FORMAT}.")
        self.path = path
        self.config = build_settings(Config, saved["config"], str(path / "state.json"))
        self.settings = self.config.model
        self.tokenizer_sha256: str = saved["data"]["tokenizer"]
        self.vocab_size: int = saved["model"]["vocab_size"]
        self.outline = outline(self.settings, self.vocab_size)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.outline.items()}

    @cached_property
    def _stored(self) -> Mapping[str, StoredTensor]:
        return stored_weights(self.path)

    def read(self, name: str) -> Tensor:
        return self._stored[name].contiguous()

    def identity(self) -> str:
        return sha256_file(self.path / MANIFEST_NAME)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        if self.tokenizer_sha256 != tokenizer.sha256:
            raise UserError(
                f"{self.path} was trained with another tokenizer than the data's: {self.tokenizer_sha256[:12]} there "
                f"and {tokenizer.sha256[:12]} here, so that its embedding means other tokens. Prepare the data with "
                "its tokenizer."
            )


def open_weights(config: Config, tokenizer: Tokenizer) -> Weights | None:
    """What ``model.weights_from`` names, checked against the run's model and tokenizer; None where it names nothing.

    Raises:
        UserError: it holds no weights, or those of a model that computes something else: says what differs.
        DataError: they are damaged.
    """
    if config.model.weights_from is None:
        return None
    path = Path(config.model.weights_from)
    weights: Weights
    if (path / "config.json").is_file():
        weights = FolderWeights(path)
    elif read_manifest(path) is not None:
        weights = CheckpointWeights(path)
    else:
        raise UserError(
            f"model.weights_from = {str(path)!r} holds no weights. Give a complete checkpoint (a step_... folder), or "
            "a folder of transformers (config.json and safetensors)."
        )
    weights.check_tokenizer(tokenizer)
    _check_same_function(weights, config.model)
    _check_shapes(weights, config.model, config.model.resolve_vocab_size(tokenizer.vocab_size))
    return weights


def outline(settings: ModelSettings, vocab_size: int) -> dict[str, Tensor]:
    """Every parameter and buffer of a decoder on the meta device; a tied head is the embedding and not named."""
    with torch.device("meta"):
        model = Decoder(settings, vocab_size)
    return dict((*model.named_parameters(), *model.named_buffers()))


def _check_shapes(weights: Weights, settings: ModelSettings, vocab_size: int) -> None:
    """Raise UserError unless ``weights`` has every parameter of the model, in its shape, and nothing beyond it.

    A buffer (an index, a mask) that it lacks starts as in any run.
    """
    there, here = weights.shapes, outline(settings, vocab_size)
    wrong = [
        f"{name} is {list(there[name])} there and {list(tensor.shape)} here"
        for name, tensor in here.items()
        if name in there and there[name] != tuple(tensor.shape)
    ]
    wrong += [
        f"{name} {list(tensor.shape)} is missing there"
        for name, tensor in here.items()
        if tensor.requires_grad and name not in there
    ]
    wrong += [f"{name} {list(shape)} is only there" for name, shape in there.items() if name not in here]
    if wrong:
        raise UserError(
            f"model.weights_from = {str(weights.path)!r} does not fit the model: {_some(wrong)}. Give the model the "
            "shape of these weights, or take others."
        )


_NOT_COMPUTED = {"vocab_size", "init_std", "init_scaled_residual", "linear", "weights_from", "mup", "experts"}
"""Settings that say how a model starts, those of training alone, and those that are compared in another way."""


def _computed(settings: ModelSettings) -> dict[str, Any]:
    """What decides what a model computes with its weights, by dotted name."""
    plain: dict[str, Any] = settings.model_dump(exclude=_NOT_COMPUTED)
    plain |= {"kv_heads": settings.effective_kv_heads, "head_dim": settings.effective_head_dim}
    plain["experts"] = f"in the blocks {settings.expert_layers}" if settings.experts else None
    if settings.experts is None:
        return plain
    if len(settings.expert_layers) == settings.layers:
        del plain["intermediate_size"]  # no block has it
    training = {"jitter", "capacity", "selection_bias", "dense_first", "every"}
    if settings.experts.routing.kind != "hybrid":
        training.add("entropy")
    own = settings.experts.model_dump(exclude=training)
    return plain | {f"experts.{key}": value for key, value in own.items()}


def _check_same_function(weights: Weights, settings: ModelSettings) -> None:
    """Raise UserError where the model would compute something else with the same weights.

    A dense layer may become one that keeps a whole weight and does something to it, as pruning does: what else it
    could become has other shapes.
    """
    there, here = _computed(weights.settings), _computed(settings)
    wrong = [
        f"model.{key} is {there[key]!r} there and {here[key]!r} here"
        for key in here
        if key in there and there[key] != here[key]
    ]
    for name, one, other in zip(
        ("embedding", "head", "attention"),
        forward_multipliers(weights.settings),
        forward_multipliers(settings),
        strict=True,
    ):
        if one != other:
            wrong.append(f"mup multiplies the {name} by {one:g} there and by {other:g} here")
    for layer in range(0 if wrong else settings.layers):
        for name in block_shapes(settings, layer):
            rules = [method_of(f"blocks.{layer}.{name}", each) for each in (weights.settings, settings)]
            if rules[0].terms() not in (DENSE, rules[1].terms()):
                wrong.append(f"blocks.{layer}.{name} is {rules[0].kind} there and {rules[1].kind} here")
    if wrong:
        raise UserError(
            f"model.weights_from = {str(weights.path)!r} is of a model that computes something else: {_some(wrong)}. "
            "Give the model the same settings, or take other weights."
        )


def _some(wrong: list[str]) -> str:
    more = f"; and {len(wrong) - _TOLD} more" if len(wrong) > _TOLD else ""
    return "; ".join(wrong[:_TOLD]) + more
