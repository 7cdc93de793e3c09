from __future__ import annotations

import io
import itertools
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.cleaning import Cleaner, CleaningSettings
from data_pipeline.errors import UserError
from data_pipeline.prepare import TokenizerTraining
from data_pipeline.prepare.train_tokenizer import sample_text, train_tokenizer
from data_pipeline.sources import StdlibSource
from data_pipeline.storage import StorageSettings
from data_pipeline.tokenizer import Tokenizer

HOW = (Cleaner(CleaningSettings()), StorageSettings())
SOURCES = {"docs": StdlibSource(kind="stdlib", part="docs", domain="docs", limit_bytes=100_000)}


@lru_cache
def trained(model_type: str = "unigram", vocab_size: int = 600) -> Tokenizer:
    return train_tokenizer(_training(model_type=model_type, vocab_size=vocab_size), SOURCES, 0.1, *HOW)


def _training(**options: object) -> TokenizerTraining:
    return TokenizerTraining.model_validate({"sample_bytes": 60_000, **options})


hostile = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.sampled_from(
            [
                "</s>", "<s>", "<unk>", "<pad>", "<0x0A>", "\u2581", "\u2047", "\u2585", "\ufffd", "\x00", "\t", "\r\n",
                "\n\n", "  ", " ", "\u00a0", "\ufeff", "e\u0301", "\ufb01", "\uff21", "\U0001f600", "a\u2581 \u2581b",
            ]
        ),
    )
).map("".join)  # fmt: skip


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@settings(max_examples=200, deadline=None)
@given(text=hostile)
@example(text="")
@example(text=" ")
@example(text="\u2581")
@example(text="\u2581 \u2581\u2581 \n \u2581</s>")
def test_every_text_comes_back_and_its_bytes_add_up(model_type: str, text: str) -> None:
    tokenizer = trained(model_type)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.piece_bytes[ids].sum() == len(text.encode())
    assert not {tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id, 0} & set(ids)


def test_a_batch_is_its_texts_one_by_one() -> None:
    texts = ["def f(x):\n\treturn x", "", "a \u2581 b", "   spaces"]
    assert [ids.tolist() for ids in trained().encode_batch(texts)] == [trained().encode(text) for text in texts]


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.sampled_from([1, 2, 5, 1000, (1 << 15) - 1, 1 << 15, (1 << 15) + 1, 100_000]), max_size=12))
def test_the_bytes_of_documents_are_the_sums_of_their_pieces(sizes: list[int]) -> None:
    tokenizer = trained()
    tokens = np.random.default_rng(0).integers(tokenizer.vocab_size, size=sum(sizes)).astype(np.uint16)
    ends = np.cumsum([0, *sizes])
    expected = [int(tokenizer.piece_bytes[tokens[a:b]].sum()) for a, b in itertools.pairwise(ends)]
    assert tokenizer.bytes_of(tokens, np.array(sizes, np.int64)).tolist() == expected


def test_piece_bytes_are_those_of_each_piece_alone() -> None:
    tokenizer = trained("bpe")
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    for i, counted in enumerate(tokenizer.piece_bytes.tolist()):
        control = processor.is_control(i) or processor.is_unknown(i)
        piece = 0 if control else len(processor.id_to_piece(i).replace("\u2581", " ").encode())
        assert counted == (1 if processor.is_byte(i) else piece)


def test_control_ids_are_fixed() -> None:
    tokenizer = trained()
    assert [tokenizer.piece(i) for i in range(5)] == ["<unk>", "<s>", "</s>", "<pad>", "<0x00>"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)
    assert tokenizer.piece_bytes[:5].tolist() == [0, 0, 0, 0, 1]
    assert tokenizer.exact
    assert tokenizer.dtype == "uint16"


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_training_is_deterministic(model_type: str) -> None:
    again = train_tokenizer(_training(model_type=model_type, vocab_size=600), SOURCES, 0.1, *HOW)
    assert again.model == trained(model_type).model
    assert again.vocab_size == 600


def test_split_digits_and_coverage_reach_the_trainer() -> None:
    digits = train_tokenizer(_training(model_type="bpe", vocab_size=600, split_digits=True), SOURCES, 0.1, *HOW)
    assert len(digits.encode("20240131")) == 8
    narrow = train_tokenizer(_training(model_type="bpe", vocab_size=600, character_coverage=0.98), SOURCES, 0.1, *HOW)
    pieces = {tokenizer: {tokenizer.piece(i) for i in range(600)} for tokenizer in (trained("bpe"), narrow)}
    assert sum(len(piece) == 1 for piece in pieces[narrow]) < sum(len(piece) == 1 for piece in pieces[trained("bpe")])


def test_the_sample_leaves_out_held_out_documents_and_keeps_to_its_size() -> None:
    everything = list(sample_text(SOURCES, 1 << 30, 0.0, *HOW))
    assert sum(len(text.encode()) for text in sample_text(SOURCES, 5000, 0.0, *HOW)) <= 5000
    some = list(sample_text(SOURCES, 1 << 30, 0.5, *HOW))
    assert 0.3 < len(some) / len(everything) < 0.7
    rest = iter(everything)
    assert all(text in rest for text in some)


def test_sizes_that_do_not_fit_are_explained() -> None:
    with pytest.raises(UserError, match=r"vocab_size = 50000 is more than the sample .* largest that fits is \d+\."):
        train_tokenizer(_training(vocab_size=50_000), SOURCES, 0.1, *HOW)
    with pytest.raises(UserError, match=r"vocab_size = 300 is less than the \d+ pieces that the bytes and the covered"):
        train_tokenizer(_training(vocab_size=300), SOURCES, 0.1, *HOW)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer file .*none\.model does not exist"):
        Tokenizer.load(tmp_path / "none.model")
    for content in (b"", b"junk" * 100, trained().model[:1000]):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.model is not a SentencePiece model"):
            Tokenizer.load(tmp_path / "bad.model")


def _foreign(**options: object) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample_text(SOURCES, 30_000, 0.0, *HOW)),
        model_writer=model,
        minloglevel=2,
        max_sentence_length=100_000,
        **options,
    )
    return Tokenizer(model.getvalue(), "foreign.model")


def test_a_foreign_tokenizer_says_that_it_is_not_exact() -> None:
    assert not _foreign(vocab_size=400).exact
    llama_like = _foreign(
        vocab_size=600, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False
    )
    assert llama_like.decode(llama_like.encode("a  b")) == "a  b"
    assert not llama_like.exact, "the dummy prefix stands for a byte that is not in the text"
    assert llama_like.pad_id == llama_like.eos_id
    with pytest.raises(UserError, match=r"foreign\.model has no EOS piece"):
        _foreign(vocab_size=400, eos_id=-1)


def test_large_vocabularies_take_four_bytes() -> None:
    tokenizer = trained()
    tokenizer = Tokenizer(tokenizer.model, "copy")
    for size, dtype in ((1 << 16, "uint16"), ((1 << 16) + 1, "uint32")):
        tokenizer.vocab_size = size
        assert tokenizer.dtype == dtype
        assert np.iinfo(dtype).max >= size - 1
