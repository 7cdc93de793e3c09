"""The exported tokenizer gives, in transformers, the ids that the data set's tokenizer gives, and the text back."""

from __future__ import annotations

import io
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from data_pipeline import Tokenizer
from data_pipeline.errors import UserError
from data_pipeline.testing import tiny_tokenizer
from pretrain.export.tokenizer_files import tokenizer_files

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
FILES = ["argparse.py", "textwrap.py", "pydoc_data/topics.py", "html/entities.py", "encodings/cp437.py", "this.py"]
STRANGE = [
    "",
    " ",
    "\n",
    "   two  spaces   ",
    "<s>text</s> <unk><pad></s>",
    "<0x0A> <0x41>",
    "a\u2581b\u2581\u2581 c\u2581",
    "\x00\x01\t\r\n\v\f",
    "\U0001f600 \u4f60\u597d \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 e\u0301 \ufb01",
    "------====____aaaa        1234567890 0x1F 3.14e-10",
]
OURS = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}


def texts() -> list[str]:
    return [(LIBRARY / name).read_text()[:60_000] for name in FILES]


def train(**settings: Any) -> Tokenizer:
    """A model of 700 pieces on real text; the defaults are those of ``pretrain-data tokenizer``."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts()[:3] for line in text.split("\t") if "\x00" not in line),
        model_writer=model,
        **{
            "vocab_size": 700,
            "byte_fallback": True,
            "allow_whitespace_only_pieces": True,
            "split_digits": True,
            "max_sentence_length": 100_000,
            "unk_id": 0,
            "bos_id": 1,
            "eos_id": 2,
            "pad_id": 3,
            "num_threads": 1,
            "minloglevel": 2,
            **OURS,
            **settings,
        },
    )
    return Tokenizer(model.getvalue(), "the test's tokenizer")


def loaded(tokenizer: Tokenizer, folder: Path) -> Any:
    for name, content in tokenizer_files(tokenizer, 4096).items():
        (folder / name).write_bytes(content)
    return transformers.AutoTokenizer.from_pretrained(folder)


def log_probability(tokenizer: Tokenizer, ids: list[int]) -> float:
    processor = SentencePieceProcessor(model_proto=tokenizer.model)
    return math.fsum(processor.get_score(ids))


def pieces_of(text: str, length: int) -> Iterator[str]:
    return (text[start : start + length] for start in range(0, len(text), length))


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "bpe"},
        {"model_type": "unigram"},
        {"model_type": "bpe", "add_dummy_prefix": True},  # as Llama 2's
        {"model_type": "unigram", "pad_id": -1, "bos_id": -1},
        {"model_type": "bpe", "unk_id": 3, "bos_id": 0, "eos_id": 1, "pad_id": -1},
        {"model_type": "bpe", "user_defined_symbols": ["<|tool|>", "import"]},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_ids_of_real_and_of_strange_text_are_equal(settings: dict[str, Any], tmp_path: Path) -> None:
    ours = train(**settings)
    theirs = loaded(ours, tmp_path)
    assert len(theirs) == ours.vocab_size
    assert (theirs.eos_token_id, theirs.bos_token_id) == (ours.eos_id, None)
    assert theirs.pad_token_id == (ours.pad_id if ours.pad_id != ours.eos_id else None)
    for text in STRANGE:
        assert theirs(text)["input_ids"] == ours.encode(text)
    count = other = 0
    for text in [*STRANGE, *(part for whole in texts() for part in pieces_of(whole, 2000))]:
        ids, expected = theirs(text)["input_ids"], ours.encode(text)
        assert theirs.decode(ids) == ours.decode(expected)
        assert not ours.exact or theirs.decode(ids) == text
        if ids != expected:
            # of two ways to cut a text that are equally likely, SentencePiece finds one by the rounding of its fp32
            assert settings["model_type"] == "unigram"
            assert log_probability(ours, ids) == pytest.approx(log_probability(ours, expected), rel=1e-6)
        count, other = count + len(expected), other + sum(one != two for one, two in zip(ids, expected, strict=False))
    assert count > 80_000
    assert other < 0.002 * count


def test_a_tiny_tokenizer_of_the_tests_is_equal(tmp_path: Path) -> None:
    ours = tiny_tokenizer()
    theirs = loaded(ours, tmp_path)
    assert [theirs(text)["input_ids"] for text in STRANGE] == [ours.encode(text) for text in STRANGE]


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"},
        {"model_type": "bpe", "remove_extra_whitespaces": True},
        {"model_type": "unigram", "treat_whitespace_as_suffix": True, "add_dummy_prefix": True},
    ],
    ids=lambda settings: list(settings)[1],
)
def test_what_tokenizer_json_can_not_say_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"can't be written for transformers: .* --no-tokenizer"):
        tokenizer_files(train(**settings), 4096)


def test_a_word_model_is_refused() -> None:
    with pytest.raises(UserError, match="neither a unigram nor a BPE model"):
        tokenizer_files(train(model_type="char", vocab_size=400, byte_fallback=False), 4096)
