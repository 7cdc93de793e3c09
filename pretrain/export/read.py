"""The weights of a folder that `transformers` wrote, or that ``pretrain export`` did."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline import Tokenizer
from data_pipeline.errors import DataError, UserError
from data_pipeline.files import sha256_file
from data_pipeline.tokenizer import SPACE_MARK

from .architecture import from_config
from .libraries import needed
from .names import SHARED_DOWN, SHARED_GATE, our_expert, our_name
from .write import INDEX, SINGLE

_DTYPES = {"F32", "F16", "BF16"}
_WHOLE_NUMBERS = {"I64", "I32", "BOOL"}
"""Of index buffers and masks."""


class FolderWeights:
    """Weights in safetensors files, one or several with an index, beside a config.json.

    Args:
        path: the folder.

    Raises:
        UserError: it is not of a model that Headrace computes, or its weights are in another format.
        DataError: a file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        config = _read_json(path / "config.json")
        self.settings = from_config(config, str(path / "config.json"))
        self._files = _files(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        self._stacks: dict[str, dict[int, tuple[Path, str, tuple[int, ...]]]] = {}
        for file in self._files:
            self._look_into(file)
        matrices = {theirs for stack in self._stacks.values() for _, theirs, _ in stack.values()}
        _check_index(path, {theirs for _, theirs in self._places.values()} | matrices)
        for name in self._stacks:
            self.shapes[name] = self._stack_shape(name)

    def read(self, name: str) -> Tensor:
        if name in self._stacks:
            stack = self._stacks[name]
            return torch.stack([_tensor(*stack[number][:2]) for number in range(len(stack))])
        tensor = _tensor(*self._places[name])
        return tensor / 2 if name.endswith(f"{SHARED_DOWN}.weight") else tensor

    def identity(self) -> str:
        hashes = {file.name: sha256_file(file) for file in (self.path / "config.json", *self._files)}
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises UserError where the folder's tokenizer has other pieces; one without files can't be compared."""
        pieces = _pieces(self.path)
        if pieces is None:
            return
        ours = [tokenizer.piece(number) for number in range(tokenizer.vocab_size)]
        if pieces != ours:
            differ = [number for number, (one, other) in enumerate(zip(pieces, ours, strict=False)) if one != other]
            what = (
                f"token {differ[0]} is {pieces[differ[0]]!r} there and {ours[differ[0]]!r} here"
                if differ
                else f"{len(pieces)} tokens there and {len(ours)} here"
            )
            raise UserError(
                f"{self.path} has another tokenizer than the data's: {what}, so that its embedding means other tokens. "
                "Prepare the data with its tokenizer."
            )

    def _look_into(self, file: Path) -> None:
        with _opened(file) as content:
            for theirs in content.keys():  # noqa: SIM118  # safe_open is no mapping
                if theirs.endswith("rotary_emb.inv_freq"):
                    continue  # older versions of transformers wrote what follows from rope_theta
                if theirs == "lm_head.weight" and self.settings.tied_embeddings:
                    continue
                stored = content.get_slice(theirs)
                if stored.get_dtype() not in _DTYPES | _WHOLE_NUMBERS:
                    raise UserError(
                        f"{file}: {theirs} has the type {stored.get_dtype()}; what can be read is F32, BF16 and F16. "
                        "Quantised weights can't be trained: give the folder they were made from."
                    )
                if theirs.endswith(SHARED_GATE):
                    _check_open(file, theirs)
                    continue
                shape = tuple(stored.get_shape())
                if expert := our_expert(theirs):
                    self._stacks.setdefault(expert[0], {})[expert[1]] = file, theirs, shape
                    continue
                name = our_name(theirs)
                if name is None:
                    raise UserError(f"{file} holds {theirs}, which a decoder of Headrace does not have.")
                self.shapes[name] = shape
                self._places[name] = file, theirs

    def _stack_shape(self, name: str) -> tuple[int, ...]:
        """Of a block's experts together, which have to be all there and alike."""
        stack = self._stacks[name]
        wanted = self.settings.experts.number if self.settings.experts else len(stack)
        if sorted(stack) != list(range(wanted)):
            lacking, beyond = sorted({*range(wanted)} - {*stack}), sorted({*stack} - {*range(wanted)})
            what = f"lacks the experts {lacking}" if lacking else f"has the experts {beyond}, beyond {wanted}"
            raise UserError(f"{self.path} {what} of {name}. Copy or download the folder again.")
        shapes = {shape for _, _, shape in stack.values()}
        if len(shapes) > 1:
            raise UserError(f"{self.path}: the experts of {name} have the shapes {sorted(shapes)}; they must be alike.")
        return (wanted, *shapes.pop())


def _files(path: Path) -> list[Path]:
    """The files of weights, in the order of their names."""
    if (path / INDEX).is_file():
        names = sorted(set(_weight_map(path).values()))
    elif (path / SINGLE).is_file():
        names = [SINGLE]
    else:
        others = sorted(each.name for each in path.iterdir() if each.suffix in (".bin", ".pt", ".pth", ".gguf"))
        found = f" (it has {', '.join(others[:3])})" if others else ""
        raise UserError(
            f"{path} has neither {SINGLE} nor {INDEX}{found}. Load and save the model with transformers, which writes "
            "safetensors."
        )
    for name in names:
        if not (path / name).is_file():
            raise DataError(f"{path / name} is missing, which {INDEX} names. Copy or download the folder again.")
    return [path / name for name in names]


def _check_index(path: Path, found: set[str]) -> None:
    if not (path / INDEX).is_file():
        return
    if missing := sorted(name for name in _weight_map(path) if _known(name) and name not in found):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"{path}: {missing[0]}{more} is not in the file that {INDEX} names for it. Copy it again.")


def _known(name: str) -> bool:
    return our_expert(name) is not None or our_name(name) is not None


def _check_open(file: Path, gate: str) -> None:
    """Raise UserError where a shared expert's gate hangs on the token."""
    if _tensor(file, gate).any():
        raise UserError(
            f"{file}: {gate} is not 0; a decoder's shared experts have no gate (model.experts.shared), so only what "
            "pretrain export wrote as qwen2_moe can be read."
        )


def _tensor(file: Path, theirs: str) -> Tensor:
    with _opened(file) as content:
        tensor: Tensor = content.get_tensor(theirs)
    return tensor


def _weight_map(path: Path) -> dict[str, str]:
    content = _read_json(path / INDEX).get("weight_map")
    if not isinstance(content, dict) or not all(isinstance(each, str) for each in content.values()):
        raise DataError(f"{path / INDEX} has no weight_map. Copy or download the folder again.")
    return content


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read: {error}. Copy or download the folder again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no JSON object. Copy or download the folder again.")
    return content


def _opened(file: Path) -> Any:
    try:
        return needed("safetensors").safe_open(file, framework="pt")
    except Exception as error:
        if isinstance(error, UserError):
            raise
        raise DataError(f"{file} can't be read: {error}. Copy or download the folder again.") from error


def _pieces(path: Path) -> list[str] | None:
    """The pieces of the folder's tokenizer by id, written as SentencePiece does; None where it has no tokenizer."""
    if (path / "tokenizer.model").is_file():
        own = Tokenizer.load(path / "tokenizer.model")
        return [own.piece(number) for number in range(own.vocab_size)]
    if not (path / "tokenizer.json").is_file():
        return None
    content = _read_json(path / "tokenizer.json")
    try:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        vocabulary = vocabulary | {each["content"]: each["id"] for each in content.get("added_tokens", [])}
        by_id = {number: piece.replace(" ", SPACE_MARK) for piece, number in vocabulary.items()}
        return [by_id.get(number, "") for number in range(max(by_id) + 1)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path / 'tokenizer.json'} has no vocabulary ({error!r}). Copy the folder again.") from error
