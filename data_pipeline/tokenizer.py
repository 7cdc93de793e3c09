"""SentencePiece, held to what the pipeline needs: exact round trips, known byte counts, an EOS no text can make.

A tokenizer trained here gives back every text it encodes. SentencePiece alone has one exception: it writes a space as
U+2581 inside its pieces, so a U+2581 of the text comes back as a space. Here that character is cut out and stands as
its three byte pieces (E2 96 81). Everything else (runs of spaces, tabs, NUL, line ends, the names of control pieces)
SentencePiece keeps, given normalisation ``identity``, no dummy prefix and byte fallback.

A tokenizer taken from elsewhere may be lossy (Unicode normalisation, a dummy prefix, no byte fallback): ``exact`` says
whether it promises the round trip, and `prepare` counts the documents whose tokens do not stand for all their bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sentencepiece import SentencePieceProcessor

from .errors import UserError

UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
"""The ids of a tokenizer trained here: Llama's first three, and a PAD of its own."""

SPACE_MARK = "\u2581"
"""How SentencePiece writes a space inside a piece."""


_TOKENS_AT_ONCE = 1 << 15  # what numpy makes of them stays in the processor's cache


class Tokenizer:
    """A SentencePiece model.

    Attributes:
        sha256: hex hash of the model file: the tokenizer's identity.
        vocab_size: number of ids.
        eos_id, bos_id, pad_id: control ids; ``bos_id`` is -1 and ``pad_id`` is ``eos_id`` where the model has none.
    """

    def __init__(self, model: bytes, origin: str) -> None:
        """Load the serialized ``model``; ``origin`` says in messages where it came from."""
        wrong = UserError(
            f"{origin} is not a SentencePiece model. Give a .model file written by SentencePiece, "
            "or train one with `pretrain-data tokenizer`."
        )
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise wrong from error
        if not model:
            raise wrong
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.get_piece_size()
        self.eos_id: int = self._processor.eos_id()
        self.bos_id: int = self._processor.bos_id()
        if self.eos_id < 0:
            raise UserError(f"{origin} has no EOS piece, which ends every document. Take a tokenizer that has one.")
        pad_id: int = self._processor.pad_id()
        self.pad_id = pad_id if pad_id >= 0 else self.eos_id

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Load a model file.

        Raises:
            UserError: the file is missing or is not a SentencePiece model with an EOS piece.
        """
        if not path.is_file():
            raise UserError(f"tokenizer file {path} does not exist. Train one with `pretrain-data tokenizer`.")
        return cls(path.read_bytes(), str(path))

    @property
    def dtype(self) -> str:
        """The narrowest of ``uint16`` and ``uint32`` that holds every id."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"

    @cached_property
    def exact(self) -> bool:
        """Whether every text comes back from its tokens, and they stand for its bytes one by one.

        So it is with byte fallback, nothing normalised and no dummy prefix; a probe text shows the latter two.
        """
        probe = "  \uff21\u00e9 \u2002\ufb01e\u0301\t\r\n\x00 \U0001f600 "
        ids = self.encode(probe)
        counted = int(self.piece_bytes[ids].sum())
        return len(self._byte_ids) == 256 and self.decode(ids) == probe and counted == len(probe.encode())

    @cached_property
    def piece_bytes(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes of text that each id stands for, [vocab_size].

        A byte piece counts 1, a control piece and UNK count 0, and a space (U+2581 in the piece) counts 1. For an exact
        tokenizer the sum over ``encode(text)`` is ``len(text.encode())``.
        """
        processor, ids = self._processor, list(range(self.vocab_size))
        sizes = [len(piece.replace(SPACE_MARK, " ").encode()) for piece in processor.id_to_piece(ids)]
        counts = np.array(sizes, np.int64)
        counts[processor.is_byte(ids)] = 1
        counts[np.logical_or(processor.is_control(ids), processor.is_unknown(ids))] = 0
        return counts

    def bytes_of(self, tokens: npt.NDArray[np.integer[Any]], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """[documents] the UTF-8 bytes that the tokens of each document stand for.

        Args:
            tokens: documents end to end.
            lengths: [documents] tokens of each, at least 1.
        """
        ends = np.cumsum(lengths)
        covered = np.empty(len(lengths), np.int64)
        first = start = 0
        while first < len(lengths):
            last = max(first + 1, int(np.searchsorted(ends, start + _TOKENS_AT_ONCE, side="right")))
            some = tokens[start : ends[last - 1]]
            begins = ends[first:last] - lengths[first:last] - start
            # "clip", or numpy would look for wrong ids, of which a tokenizer makes none
            np.add.reduceat(self.piece_bytes.take(some, mode="clip"), begins, out=covered[first:last])
            first, start = last, int(ends[last - 1])
        return covered

    @cached_property
    def _byte_ids(self) -> dict[str, int]:
        """The byte pieces (``<0x0A>``) and their ids."""
        byte_ids = np.flatnonzero(self._processor.is_byte(list(range(self.vocab_size)))).tolist()
        return {self._processor.id_to_piece(i): i for i in byte_ids}

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without BOS or EOS."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """The ids of each text, without BOS or EOS, on the calling thread."""
        encoded: list[npt.NDArray[np.int32]] = self._processor.encode(list(texts), out_type="numpy", num_threads=1)
        for row, text in enumerate(texts):
            if SPACE_MARK in text and self.exact:
                encoded[row] = self._encode_space_marks(text)
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; control pieces stand for nothing."""
        text: str = self._processor.decode([int(i) for i in ids])
        return text

    def piece(self, token: int) -> str:
        """The piece of one id, as SentencePiece writes it."""
        piece: str = self._processor.id_to_piece(int(token))
        return piece

    def _encode_space_marks(self, text: str) -> npt.NDArray[np.int32]:
        between = self._processor.encode(text.split(SPACE_MARK), out_type="numpy", num_threads=1)
        mark = np.array([self._byte_ids[f"<0x{byte:02X}>"] for byte in SPACE_MARK.encode()], np.int32)
        parts = [between[0]]
        for part in between[1:]:
            parts += [mark, part]
        return np.concatenate(parts)
