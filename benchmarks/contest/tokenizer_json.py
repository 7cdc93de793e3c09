"""A SentencePiece BPE model as a ``tokenizer.json`` of the Rust ``tokenizers``, for datatrove, which reads no other."""

from __future__ import annotations

from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

_SPACE_MARK = "\u2581"


def write_tokenizer_json(model: Path, path: Path) -> str:
    """Convert a model that has byte fallback, no normalisation and no dummy prefix; returns its EOS piece.

    A piece's id is its rank among the merges. Text is first split before every run of spaces, over which no piece
    reaches: short words are merged (and cached) much faster than whole documents.
    """
    processor = SentencePieceProcessor(model_file=str(model))
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    plain = {
        piece: i
        for i, piece in enumerate(pieces)
        if not (processor.is_byte(i) or processor.is_control(i) or processor.is_unknown(i))
    }
    assert not any(_SPACE_MARK in piece.lstrip(_SPACE_MARK) for piece in plain)
    merges = [
        (piece[:cut], piece[cut:])
        for piece in plain
        for cut in sorted(range(1, len(piece)), key=lambda cut: (plain.get(piece[:cut], 0), plain.get(piece[cut:], 0)))
        if piece[:cut] in plain and piece[cut:] in plain
    ]
    unknown = processor.id_to_piece(processor.unk_id())
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token=unknown))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE_MARK)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{_SPACE_MARK}+"), "merged_with_next")
    eos = str(processor.id_to_piece(processor.eos_id()))
    tokenizer.add_special_tokens([AddedToken(eos, special=True)])
    tokenizer.save(str(path))
    return eos
