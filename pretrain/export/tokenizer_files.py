"""The tokenizer as `transformers` reads it: tokenizer.json, made from the SentencePiece model piece by piece.

A tokenizer trained by Headrace writes a space as U+2581 inside its pieces and lets a U+2581 of the text fall back to
its bytes. tokenizer.json holds such pieces with the plain space, so that nothing has to be replaced on the way and a
U+2581 is a character without a piece. Tokenizers from elsewhere take both for the same, as SentencePiece does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from data_pipeline import Tokenizer
from data_pipeline.errors import UserError
from data_pipeline.tokenizer import SPACE_MARK

from .libraries import needed

_UNIGRAM, _BPE = 1, 2
_NORMAL, _USER_DEFINED = 1, 4
"""Values of the enumerations ModelType and Type in sentencepiece_model.proto."""

PROBES = (
    "  \uff21\u00e9 \u2002\ufb01e\u0301\t\r\n\x00 \U0001f600 ",
    "def f(x):\n    return x ** 2  # <s></s> <unk> <pad> <0x0A>\n\n\n",
    "a\u2581b \u2581\u2581 ---------- ==== aaaaaaa          12345 3.14",
    "",
    " ",
    "\n",
)
"""Texts in which converted tokenizers are known to go wrong."""


def tokenizer_files(tokenizer: Tokenizer, context: int) -> dict[str, bytes]:
    """The files of ``tokenizer`` in a folder for transformers, by name.

    Args:
        tokenizer: of the data set; its documents end in EOS and begin without BOS, and so it is told to transformers.
        context: tokens of a training sequence.

    Raises:
        UserError: the tokenizer does something that tokenizer.json can't say, or another package is needed.
    """
    converted = json.dumps(_tokenizer_json(tokenizer), ensure_ascii=False).encode()
    _check_equal(tokenizer, converted)
    has_pad = tokenizer.pad_id != tokenizer.eos_id
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.piece(tokenizer.eos_id),
        **({"pad_token": tokenizer.piece(tokenizer.pad_id)} if has_pad else {}),
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        # no text makes a control token, as in the training data
        "split_special_tokens": True,
    }
    return {
        "tokenizer.model": tokenizer.model,
        "tokenizer.json": converted,
        "tokenizer_config.json": (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode(),
    }


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    model = needed("sentencepiece.sentencepiece_model_pb2").ModelProto.FromString(tokenizer.model)
    plain_spaces = tokenizer.exact
    pieces = [(str(each.piece), float(each.score), int(each.type)) for each in model.pieces]
    if plain_spaces:
        pieces = [(piece.replace(SPACE_MARK, " "), score, kind) for piece, score, kind in pieces]
    prepares: list[dict[str, Any]] = []
    if model.normalizer_spec.add_dummy_prefix:
        prepares.append({"type": "Prepend", "prepend": SPACE_MARK})
    if not plain_spaces:
        prepares.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK})
    restores: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.normalizer_spec.add_dummy_prefix:
        restores.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    kinds = {_UNIGRAM: _unigram, _BPE: _bpe}
    if model.trainer_spec.model_type not in kinds:
        raise UserError("the tokenizer is neither a unigram nor a BPE model, so it can't be written for transformers.")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": piece,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != _USER_DEFINED,
            }
            for number, (piece, _, kind) in enumerate(pieces)
            if kind not in (_NORMAL, 5, 6)
        ],
        "normalizer": {"type": "Sequence", "normalizers": prepares} if prepares else None,
        "pre_tokenizer": _apart(pieces),
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": restores[1 if plain_spaces else 0 :]},
        "model": kinds[model.trainer_spec.model_type](pieces, model),
    }


def _bpe(pieces: list[tuple[str, float, int]], model: Any) -> dict[str, Any]:
    """SentencePiece merges two neighbours whose concatenation is a piece, that of the highest score first."""
    normal = {piece: (-score, number) for number, (piece, score, kind) in enumerate(pieces) if kind == _NORMAL}

    def merges() -> Iterator[tuple[tuple[float, int], int, list[str]]]:
        for piece, rank in normal.items():
            for cut in range(1, len(piece)):
                if piece[:cut] in normal and piece[cut:] in normal:
                    yield rank, cut, [piece[:cut], piece[cut:]]

    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": pieces[model.trainer_spec.unk_id][0],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece: number for number, (piece, _, _) in enumerate(pieces)},
        "merges": [pair for _, _, pair in sorted(merges())],
    }


def _apart(pieces: list[tuple[str, float, int]]) -> dict[str, Any] | None:
    """Characters of byte and control pieces that no other piece has, each by itself: so they come out in any case, and
    a text that is spelled like such a piece is not taken for it."""
    known = {character for piece, _, kind in pieces if kind in (_NORMAL, _USER_DEFINED) for character in piece}
    unknown = {character for piece, _, kind in pieces if kind not in (_NORMAL, _USER_DEFINED) for character in piece}
    if not unknown - known:
        return None
    pattern = "|".join(re.escape(character) for character in sorted(unknown - known))
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _unigram(pieces: list[tuple[str, float, int]], model: Any) -> dict[str, Any]:
    """The pieces' log-probabilities. Other than SentencePiece, tokenizers looks for control and byte pieces in the
    text: they get a score below that of any text that could be spelled like them."""
    lowest = min(score for _, score, kind in pieces if kind == _NORMAL)
    never = (lowest - 10.0) * max(len(piece) for piece, _, kind in pieces if kind != _NORMAL)
    return {
        "type": "Unigram",
        "unk_id": model.trainer_spec.unk_id,
        "byte_fallback": model.trainer_spec.byte_fallback,
        "vocab": [[piece, score if kind in (_NORMAL, _USER_DEFINED) else never] for piece, score, kind in pieces],
    }


def _check_equal(tokenizer: Tokenizer, converted: bytes) -> None:
    """Raise UserError where the converted tokenizer gives other ids, or another text back."""
    other = needed("tokenizers").Tokenizer.from_str(converted.decode())
    other.encode_special_tokens = True
    for text in PROBES:
        ids = other.encode(text, add_special_tokens=False).ids
        if ids != tokenizer.encode(text) or other.decode(ids, skip_special_tokens=True) != tokenizer.decode(ids):
            raise UserError(
                f"the tokenizer can't be written for transformers: {text!r} would be {ids[:20]} instead of "
                f"{tokenizer.encode(text)[:20]}. Export with --no-tokenizer."
            )
