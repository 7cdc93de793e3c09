"""Training a SentencePiece model on a sample of the sources that depends on their content only."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping

import sentencepiece

from ..cleaning import Cleaner
from ..errors import HeadraceError, UserError
from ..sources import Document, Rejected, Source
from ..storage import StorageSettings
from ..tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID, Tokenizer
from .parts import content_id, is_heldout
from .settings import TokenizerTraining

_SENTENCE_CHARACTERS = 2048
_RESERVED = re.compile("[\t\x00\u2047\u2581\u2585]")
"""SentencePiece drops a training sentence that holds one of these; sentences end there instead."""

_PARTS_AT_MOST = 4096
_SAMPLE_PART_BYTES = 16 << 20


def train_tokenizer(
    settings: TokenizerTraining,
    sources: Mapping[str, Source],
    heldout_fraction: float,
    cleaner: Cleaner,
    storage: StorageSettings,
) -> Tokenizer:
    """Train on a sample of the cleaned training documents; the same input gives the same bytes (one thread).

    Raises:
        UserError: no text, or a vocabulary size that the sample does not allow; names the largest or smallest that
            it does.
    """
    model = io.BytesIO()
    failures: list[HeadraceError] = []
    sentences = _keep_error(
        _sentences(sample_text(sources, settings.sample_bytes, heldout_fraction, cleaner, storage)), failures
    )
    first = next(sentences, None)
    if first is None:
        raise UserError(f"the sources ({', '.join(sources)}) hold no text to train a tokenizer on. Check `sources`.")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_chain(first, sentences),
            model_writer=model,
            model_type=settings.model_type,
            vocab_size=settings.vocab_size,
            character_coverage=settings.character_coverage,
            split_digits=settings.split_digits,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * _SENTENCE_CHARACTERS,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        raise _explain(settings, str(error)) from error
    return Tokenizer(model.getvalue(), "the trained tokenizer")


def sample_text(
    sources: Mapping[str, Source],
    sample_bytes: int,
    heldout_fraction: float,
    cleaner: Cleaner,
    storage: StorageSettings,
) -> Iterator[str]:
    """At most about ``sample_bytes`` of training text, from the beginnings of parts all over every source.

    Each source gives in proportion to its input bytes (equally, where one does not know its size).
    """
    parts = {name: source.parts(_SAMPLE_PART_BYTES, storage) for name, source in sources.items()}
    sizes = {name: sum(part.bytes for part in found) for name, found in parts.items()}
    if not all(sizes.values()):
        sizes = dict.fromkeys(sizes, 1)
    for name, source in sources.items():
        share = sample_bytes * sizes[name] // sum(sizes.values())
        chosen = parts[name][:: -(-len(parts[name]) // _PARTS_AT_MOST) or 1]
        for number, part in enumerate(chosen):
            quota = share // (len(chosen) - number)
            for record in source.read(part, storage):
                document = record if isinstance(record, Rejected) else cleaner.clean(record)
                if not isinstance(document, Document):
                    continue
                utf8 = document.text.encode()
                if is_heldout(content_id(utf8), heldout_fraction):
                    continue
                taken = utf8[:quota]
                yield taken.decode(errors="ignore")
                quota -= len(taken)
                share -= len(taken)
                if quota == 0:
                    break


def _sentences(texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
        for piece in _RESERVED.split(text):
            for start in range(0, len(piece), _SENTENCE_CHARACTERS):
                yield piece[start : start + _SENTENCE_CHARACTERS]


def _keep_error(texts: Iterator[str], failures: list[HeadraceError]) -> Iterator[str]:
    """``texts``; an error among them is kept in ``failures``, for SentencePiece passes on only its words."""
    try:
        yield from texts
    except HeadraceError as error:
        failures.append(error)
        raise


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _explain(settings: TokenizerTraining, message: str) -> UserError:
    if largest := re.search(r"value <= (\d+)", message):
        return UserError(
            f"tokenizer.train.vocab_size = {settings.vocab_size} is more than the sample of the sources can fill; the "
            f"largest that fits is {largest[1]}. Lower it, or give more text."
        )
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"tokenizer.train.vocab_size = {settings.vocab_size} is less than the {smallest[1]} pieces that the bytes "
            "and the covered characters need. Raise it, or lower character_coverage."
        )
    return UserError(f"SentencePiece could not train the tokenizer: {' '.join(message.split())}")
