"""Held-out scores against NumPy on the same model's logits; and evaluating leaves no trace in training (law 3)."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor

from data_pipeline import TokenSource
from data_pipeline.layout import BlockLayout
from data_pipeline.storage import StorageSettings
from data_pipeline.testing import tiny_tokenizer, write_token_dataset
from pretrain.distributed import Distributed
from pretrain.evaluation import Score, evaluate, evaluation_metrics
from pretrain.model import Decoder, initialize_
from pretrain.model.settings import ModelSettings
from tests.ranks import run_on_ranks

from .steps import VOCABULARY, batch_of, micro_batches, tiny_config

TOKENS, SEQ_LEN, BLOCK, EOS = 300, 16, 80, 2
MODEL = {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 24, "init_std": 0.5}
TEXT = "the quick brown fox naïvely jumps over the lazy dog – again and again – until morning comes "


def documents(seed: int, count: int) -> list[list[int]]:
    """Pieces of the text, of 1 to 40 tokens; they hold characters of one, two and three bytes."""
    random = np.random.default_rng(seed)
    ids = tiny_tokenizer(TOKENS).encode(TEXT)
    starts = random.integers(0, len(ids) - 2, count)
    return [ids[start : start + random.integers(1, 40)] for start in starts]


def write_data(folder: Path) -> Path:
    groups = {("a", "heldout"): documents(1, 9), ("b", "heldout"): documents(2, 10)}
    train = {(name, "train"): documents(3, 4) for name in "ab"}
    write_token_dataset(folder, {**groups, **train}, block_tokens=BLOCK, vocab_size=TOKENS)
    return folder


def rows_of(group: list[list[int]]) -> np.ndarray:
    """[n, SEQ_LEN + 1]: documents and their EOS one after the other, the last row filled with EOS."""
    stream = [token for document in group for token in (*document, EOS)]
    starts = range(0, len(stream), SEQ_LEN)
    stream += [EOS] * SEQ_LEN
    return np.array([stream[start : start + SEQ_LEN + 1] for start in starts])


def byte_lengths() -> list[int]:
    """Of every piece, from SentencePiece itself: one for a byte, none for control symbols, else its text's."""
    tokenizer = tiny_tokenizer(TOKENS)
    pieces = SentencePieceProcessor(model_proto=tokenizer.model)
    lengths = []
    for piece in range(TOKENS):
        text = pieces.id_to_piece(piece).replace("▁", " ")
        lengths.append(1 if pieces.is_byte(piece) else 0 if pieces.is_control(piece) else len(text.encode()))
    return lengths


def model() -> Decoder:
    decoder = Decoder(ModelSettings(**MODEL), TOKENS)
    initialize_(decoder, 3)
    return decoder.eval()


def expected(rows: np.ndarray) -> tuple[float, int, int]:
    """Nats, labels and bytes: each document of each row alone through the model, log-softmax in NumPy float64."""
    decoder, lengths = model(), byte_lengths()
    nats, labels, text = 0.0, 0, 0
    for row in rows:
        starts = [0, *(place + 1 for place in range(SEQ_LEN) if row[place] == EOS), SEQ_LEN]
        for first, last in itertools.pairwise(starts):
            inside = [place for place in range(first, last) if row[place] != EOS]
            if not inside:
                continue
            tokens = torch.from_numpy(row[inside])[None]
            with torch.no_grad():
                logits = decoder(tokens, torch.arange(len(inside))[None], torch.zeros_like(tokens), True)[0]
            scores = logits.double().numpy()
            highest = scores.max(axis=1, keepdims=True)
            log_p = scores - highest - np.log(np.exp(scores - highest).sum(axis=1, keepdims=True))
            targets = row[np.array(inside) + 1]
            nats -= log_p[np.arange(len(inside)), targets].sum()
            labels += len(inside)
            text += sum(lengths[target] for target in targets)
    return float(nats), labels, text


def scores_on_a_rank(folder: Path, bounds: list[int | None]) -> list[Any]:
    from pretrain.distributed import start

    ranks = start(60)
    return [scores(ranks, folder, bound) for bound in bounds]


def scores(ranks: Distributed, folder: Path, sequences: int | None) -> list[tuple[float, int, int, int]]:
    """Of both sources, with the number of forward passes that this rank made."""
    decoder, passes = model(), []

    def forward(batch: Any) -> torch.Tensor:
        passes.append(tuple(batch.tokens.shape))
        logits: torch.Tensor = decoder(batch.tokens, batch.positions, batch.document_ids, batch.single_document)
        return logits

    sources = {domain: TokenSource(folder, domain, "heldout", SEQ_LEN) for domain in "ab"}
    lengths = torch.from_numpy(tiny_tokenizer(TOKENS).piece_bytes)
    found = evaluate(forward, sources, lengths, 2, sequences, ranks)
    assert set(passes) == {(2, SEQ_LEN)}
    return [(score.nats, score.labels, score.bytes, len(passes)) for score in found]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_scores_equal_numpys(tmp_path: Path, world_size: int) -> None:
    rows = [rows_of(documents(1, 9)), rows_of(documents(2, 10))]
    bounds = [None, 5]
    results = run_on_ranks(scores_on_a_rank, world_size, write_data(tmp_path / "data"), bounds)
    assert all(result == results[0] for result in results)
    for result, bound in zip(results[0], bounds, strict=True):
        parts = [part[:bound] for part in rows]
        assert all(len(part) % (2 * world_size) for part in parts)  # the last batches have holes
        for (nats, labels, text, _), part in zip(result, parts, strict=True):
            assert (labels, text) == expected(part)[1:]
            assert nats == pytest.approx(expected(part)[0], rel=1e-6)
        assert result[0][3] == sum(math.ceil(len(part) / (2 * world_size)) for part in parts)


def scores_of_what_is_left(folder: Path) -> list[Any]:
    from pretrain.distributed import start

    storage = StorageSettings()
    sources = {d: TokenSource(folder, d, "heldout", SEQ_LEN, storage=storage, on_damage="hole") for d in "ab"}
    logits = torch.zeros(2, SEQ_LEN, TOKENS)
    found = evaluate(lambda batch: logits, sources, torch.ones(TOKENS, dtype=torch.long), 2, None, start(60))
    return [found, evaluation_metrics(["a", "b"], found)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_damage_is_told_by_its_blocks_and_a_domain_of_which_nothing_is_left_has_no_score(
    tmp_path: Path, world_size: int
) -> None:
    folder = write_data(tmp_path / "data")
    (a, b), layout = (TokenSource(folder, domain, "heldout", SEQ_LEN) for domain in "ab"), BlockLayout(BLOCK, "uint16")
    offset, sequences = layout.data_offset(1), BLOCK // SEQ_LEN
    damaged = bytearray(Path(a.where(0)).read_bytes())
    damaged[offset + 3] ^= 1
    Path(a.where(0)).write_bytes(damaged)
    Path(b.where(0)).unlink()
    every = b.sequences
    (shard_a,), (shard_b,) = a.shards.names, b.shards.names
    told = f"shard {shard_a} of source 'a', block 1 at byte {offset}: checksum ({sequences} sequences)"
    for found, fields in run_on_ranks(scores_of_what_is_left, world_size, folder):
        assert [(score.holes, score.damage.startswith(told)) for score in found] == [(sequences, True), (every, False)]
        assert f"shard {shard_b} of source 'b', block 0 at byte {layout.data_offset(0)}: missing (" in found[1].damage
        assert fields["heldout_holes"] == sequences + every
        assert fields["heldout_damage"] == f"{told}; {found[1].damage}"
        assert fields["loss"] == fields["domain_loss/a"] == pytest.approx(math.log(TOKENS))
        assert not [key for key in fields if key.startswith("domain_") and key.endswith("/b")]


def test_score_in_its_units() -> None:
    """8 nats over 4 labels of 10 bytes: 2 nats a label, e^2, 8 / ln 2 / 10 bits a byte."""
    score = Score(nats=8.0, labels=4, bytes=10)
    assert score.loss == 2.0
    assert score.perplexity == pytest.approx(7.389056)
    assert score.bits_per_byte == pytest.approx(1.154156)


def test_scores_without_an_answer_do_not_crash() -> None:
    assert math.isnan(Score(0.0, 0, 0).loss)
    assert Score(3.0, 2, 0).bits_per_byte == math.inf
    assert math.isfinite(Score(1e6, 2, 5).perplexity)


def test_the_whole_is_over_all_labels_together() -> None:
    fields = evaluation_metrics(["a", "b"], [Score(30.0, 10, 50), Score(2.0, 2, 3)])
    assert fields["evaluation"] == "heldout"
    assert fields["tokens"] == 12
    assert fields["loss"] == pytest.approx(32 / 12)  # not the mean 2.0 of 3.0 and 1.0
    assert fields["bits_per_byte"] == pytest.approx(32 / math.log(2) / 53)
    assert (fields["domain_loss/a"], fields["domain_loss/b"]) == (3.0, 1.0)
    assert fields["domain_perplexity/b"] == pytest.approx(math.e)
    assert "heldout_holes" not in fields
    damaged = evaluation_metrics(["a", "b"], [Score(30.0, 10, 50, holes=2), Score(2.0, 2, 3, holes=1)])
    assert damaged["heldout_holes"] == 3
    assert fields["domain_bits_per_byte/a"] == pytest.approx(30 / math.log(2) / 50)


class Rows:
    """A held-out source of the rows of another step."""

    sequences, eos_id, on_damage, remote = 8, EOS, "stop", False

    def read_or_damage(self, indices: np.ndarray, windows: None) -> tuple[np.ndarray, dict[int, Any]]:
        return batch_of(9, np.asarray(indices)).rows.numpy(), {}


def train_with_and_without(ranks: Distributed, stage: int, checkpointing: str) -> None:
    from pretrain.checkpoint.random_state import seed_generators
    from pretrain.engine import Engine
    from pretrain.objective import Objective

    config = tiny_config(
        engine={"zero_stage": stage},
        training={"activation_checkpointing": checkpointing},
        objective={"reweighting": {"strategy": "linupper"}},
    )
    ends: list[Any] = []
    for evaluating in (False, True):
        engine, objective = Engine(config, VOCABULARY, ranks), Objective(config.objective, 2, ranks)
        seed_generators(1, ranks.rank)
        statistics: list[Any] = []
        for step in range(3):
            if evaluating:
                engine.evaluating(True)
                source = cast(TokenSource, Rows())  # as much of one as an evaluation asks for
                evaluate(engine.forward, {"a": source}, torch.ones(VOCABULARY, dtype=torch.long), 2, None, ranks)
                engine.evaluating(False)
            batches = micro_batches(step, ranks, 1)
            engine.begin_step(len(batches))
            objective.begin_step(step, batches)
            for batch in batches:
                engine.backward(objective.micro_step(engine.forward(batch), batch))
            norm = float(engine.step(1e-3))
            seen = objective.end_step()
            statistics.append((norm, seen.objective, seen.source_losses, seen.source_labels, seen.holes))
            assert seen.weights is not None
            statistics.append(seen.weights.weights.tolist())
        ends.append((engine.full_parameters(), statistics, torch.get_rng_state().tolist(), np.random.random()))
    (one, *others), (other, *same) = ends
    assert others == same
    assert all(torch.equal(one[name], other[name]) for name in one)


def every_stage() -> None:
    from pretrain.distributed import start

    ranks = start(60)
    train_with_and_without(ranks, 1, "none")
    train_with_and_without(ranks, 3, "full")


@pytest.mark.slow
def test_evaluating_changes_nothing_in_training() -> None:
    run_on_ranks(every_stage, 2)
