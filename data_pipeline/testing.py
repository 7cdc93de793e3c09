"""Tiny data sets for tests: given tokens, through the real shard writer."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceTrainer

from .files import publish_bytes
from .layout import TOKENIZER_FILE, BlockLayout
from .manifest import Manifest, Shard, read_manifest, write_manifest
from .shards import ShardContent, write_shard
from .tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID, Tokenizer


def tiny_tokenizer(vocab_size: int = 300) -> Tokenizer:
    """A byte-fallback tokenizer of ``vocab_size`` (287 to 400) pieces, trained on one sentence in 10 ms."""
    sentence = (
        "the quick brown fox jumps over the lazy dog and then it sleeps until the early morning comes around again"
    )
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([sentence + "\n"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        unk_id=UNK_ID,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        pad_id=PAD_ID,
        num_threads=1,
        minloglevel=2,
    )
    return Tokenizer(model.getvalue(), "the tiny tokenizer")


def write_token_dataset(
    folder: Path,
    documents: Mapping[tuple[str, str], Sequence[Sequence[int]]],
    *,
    block_tokens: int = 64,
    documents_per_shard: int | None = None,
    vocab_size: int = 300,
) -> Manifest:
    """Write a valid data set of given token documents, in the given order, and return its manifest.

    The order is not that of shuffle keys, so `first_key` of every shard is 0.

    Args:
        folder: made if missing.
        documents: per (domain, split) the documents as lists of ids without EOS, which is added; an id may be
            anything below ``vocab_size`` but EOS (2).
        block_tokens: tokens per block.
        documents_per_shard: documents in each shard; ``None``: one shard per (domain, split).
        vocab_size: of the tokenizer that is written beside (287 to 400).
    """
    tokenizer = tiny_tokenizer(vocab_size)
    layout = BlockLayout(block_tokens, tokenizer.dtype)
    folder.mkdir(parents=True, exist_ok=True)
    publish_bytes(folder / TOKENIZER_FILE, tokenizer.model)
    shards: list[Shard] = []
    for (domain, split), group in documents.items():
        size = documents_per_shard or len(group)
        for first in range(0, len(group), size):
            content = _content(group[first : first + size], tokenizer, layout, f"{domain}/{split}", first)
            shards.append(write_shard(folder, f"{len(shards):06d}", domain, split, layout, tokenizer.eos_id, content))
    manifest = Manifest.model_validate(
        {
            "block_tokens": block_tokens,
            "dtype": layout.dtype,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "bos_id": tokenizer.bos_id,
            "pad_id": tokenizer.pad_id,
            "tokenizer_sha256": tokenizer.sha256,
            "shards": tuple(shards),
            "sources": {},
            "settings": {},
        }
    )
    write_manifest(folder, manifest)
    return read_manifest(folder)


def _content(
    group: Sequence[Sequence[int]], tokenizer: Tokenizer, layout: BlockLayout, label: str, first: int
) -> ShardContent:
    streams = [np.array([*document, tokenizer.eos_id], layout.token_dtype) for document in group]
    lengths = np.array([len(stream) for stream in streams], np.int64)
    return ShardContent(
        tokens=np.concatenate(streams),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        text_bytes=np.array([int(tokenizer.piece_bytes[stream].sum()) for stream in streams], np.int64),
        ids=[hashlib.blake2b(stream.tobytes(), digest_size=16).hexdigest() for stream in streams],
        urls=[f"synthetic:{label}/{first + row}" for row in range(len(group))],
        metadata=[""] * len(group),
        first_key=0,
    )
