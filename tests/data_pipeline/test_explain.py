"""`explain` and `when-seen`: every row of every step named by its documents, and the way back, over a run's changes."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import DataError, StepLoader, UserError
from data_pipeline.explain import ExplainedRow, describe, explain
from data_pipeline.history import HISTORY_FILE, Stretch, read_history, record_stretch
from data_pipeline.manifest import read_manifest
from data_pipeline.order import Order
from data_pipeline.prepare.parts import shuffle_key
from data_pipeline.shard_reading import read_documents
from data_pipeline.stream import StreamSettings, open_stream
from data_pipeline.testing import tiny_tokenizer, write_token_dataset
from data_pipeline.when_seen import Seen, when_seen
from tests.data_pipeline.prepared import make_texts, plain_settings
from tests.data_pipeline.prepared import run as run_prepare
from tests.http_server import HttpServer

SEQ = 16
Documents = dict[tuple[str, str], list[list[int]]]


@pytest.fixture(scope="module")
def documents() -> Documents:
    random = np.random.default_rng(3)

    def key(document: list[int]) -> int:
        return shuffle_key(hashlib.blake2b(np.array([*document, 2], "<u2").tobytes(), digest_size=16).digest(), 0)

    def some(count: int) -> list[list[int]]:
        made = [random.integers(4, 300, random.integers(1, 60)).tolist() for _ in range(count)]
        return sorted(made, key=key)  # as `prepare` writes them

    return {("a", "train"): some(90), ("b", "train"): some(25), ("a", "heldout"): some(5)}


@pytest.fixture(scope="module")
def folder(documents: Documents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explained") / "data"
    write_token_dataset(folder, documents, block_tokens=64, documents_per_shard=30)
    return folder


def stretch(folder: Path, **changes: Any) -> Stretch:
    stream = StreamSettings.model_validate(
        {
            "seq_len": SEQ,
            "sources": {
                "a": {"path": str(folder), "domain": "a", "weight": 2.0, "max_epochs": None},
                "b": {"path": str(folder), "domain": "b", "max_epochs": None},
            },
        }
    )
    with_identity = open_stream(stream, 5)
    settings: dict[str, Any] = {
        "first_step": 0,
        "first_position": 0,
        "end_step": 20,
        "world_size": 2,
        "micro_batch": 3,
        "global_batch": 12,
        "ramp": ((2, 6),),
        "skip_ranges": ((40, 47),),
        "seed": 5,
        "stream": stream,
        "data_sets": {
            name: source.manifest.identity
            for name, source in zip(with_identity.names, with_identity.sources, strict=True)
        },
    }
    return Stretch.model_validate({**settings, **changes})


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    """A run of 20 steps whose last twelve were taken on three ranks with another batch."""
    record_stretch(tmp_path, stretch(folder))
    record_stretch(
        tmp_path,
        stretch(folder, first_step=8, first_position=91, world_size=3, micro_batch=1, global_batch=9, ramp=()),
    )
    return tmp_path


def loaded(run: Path) -> Iterator[tuple[int, int, int, int, list[int]]]:
    """(step, rank, row, position, tokens) as the loaders of all ranks hand them out."""
    for stretch, end_step in read_history(run).spans():
        stream = open_stream(stretch.stream, stretch.seed)
        for rank in range(stretch.world_size):
            with StepLoader(
                stream.order,
                stream.sources,
                rank=rank,
                world_size=stretch.world_size,
                micro_batch=stretch.micro_batch,
                plan=stretch.plan,
                seq_len=SEQ,
                start_step=stretch.first_step,
                start_position=stretch.first_position,
                end_step=end_step,
                prefetch=0,
            ) as loader:
                for number, step in enumerate(loader, start=stretch.first_step + 1):
                    row = 0
                    for batch in step.micro_batches:
                        for position, tokens in zip(batch.run_positions.tolist(), batch.tokens.tolist(), strict=True):
                            yield number, rank, row, position, tokens
                            row += 1


def rebuilt(row: ExplainedRow, documents: Documents) -> list[int]:
    """The tokens of a row, put together from the documents that `explain` names; EOS fills what is left."""
    tokens = [2] * SEQ
    for part in row.documents:
        domain, _, number = part.url.removeprefix("synthetic:").partition("/train/")
        document = [*documents[(domain, "train")][int(number)], 2]
        tokens[part.first : part.first + part.tokens] = document[part.skipped : part.skipped + part.tokens]
    return tokens


def test_every_row_of_every_step_is_explained(run: Path, documents: Documents, folder: Path) -> None:
    expected = sorted(loaded(run))
    assert len(expected) == 2 * 6 + 6 * 12 + 12 * 9
    rows = [row for step in range(1, 21) for row in explain(run, step, None, None, False)]
    found = sorted((row.step, row.rank, row.row, row.position, rebuilt(row, documents)) for row in rows)
    assert found == expected
    for row in rows[:40]:
        content = (folder / "shards" / f"{row.shard}.tar").read_bytes()[row.offset : row.offset + 2 * SEQ]
        assert np.frombuffer(content, "<u2").tolist() == rebuilt(row, documents)


def test_when_seen_is_the_inverse(run: Path, documents: Documents) -> None:
    seats: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for step in range(1, 21):
        for row in explain(run, step, None, None, False):
            for part in row.documents:
                seats[part.id].append((step, row.rank, row.row, row.position, row.epoch, part.skipped, part.tokens))

    def seat(seen: Seen) -> tuple[int, ...]:
        return seen.step, seen.rank, seen.row, seen.position, seen.epoch, seen.first, seen.tokens

    assert len(seats) > 60
    for id, expected in seats.items():
        assert sorted(map(seat, when_seen(run, id))) == sorted(expected)
    assert any(len({step for step, *_ in places}) > 3 for places in seats.values()), "no document in several epochs"


def test_by_url_by_id_and_held_out(run: Path, folder: Path) -> None:
    manifest = open_stream(read_history(run).stretches[0].stream, 5).sources[0].manifest
    by_url = when_seen(run, "synthetic:b/train/7")
    assert by_url
    assert when_seen(run, by_url[0].id) == by_url
    (heldout,) = (shard for shard in manifest.shards if shard.split == "heldout")
    row = read_documents(folder, heldout).to_pylist()[0]
    for name in (row["id"], row["url"]):
        with pytest.raises(UserError, match=r"is held out in source 'a'.* never trains on it"):
            when_seen(run, name)
    for name in ("0" * 32, "http://nowhere"):
        with pytest.raises(UserError, match=f"no source of .* holds the document '{name}'"):
            when_seen(run, name)


def test_the_text_stands_with_its_document(run: Path, documents: Documents) -> None:
    """Not in one piece, of which nobody sees where one document ends and the next begins."""
    decode = tiny_tokenizer().decode
    several = 0
    for step in range(1, 6):
        for row in explain(run, step, None, None, True):
            shown = describe(row)
            several += len(row.documents) > 1
            for part in row.documents:
                domain, _, number = part.url.removeprefix("synthetic:").partition("/train/")
                text = decode(documents[(domain, "train")][int(number)][part.skipped : part.skipped + part.tokens])
                assert part.text == text
                after = shown.partition(f"{part.id} {part.url}")[2].partition("\n")[2].splitlines()
                own = list(itertools.takewhile(lambda line: line.startswith("    | "), after))
                assert own == [f"    | {line}" for line in text.splitlines()]
    assert several > 10
    assert {part.text for row in explain(run, 1, None, None, False) for part in row.documents} == {None}


def test_a_document_left_out_by_prepare_is_told_with_its_reason(folder: Path, tmp_path: Path) -> None:
    texts = [text for text in make_texts(60, 1) if len(text.split()) > 2]
    plain = plain_settings(tmp_path, {"first": ("a", [*texts, "too short", texts[5]])})
    cleaning = {"quality": {"min_words": 3, "min_mean_word_length": None}, "exact_duplicates": True}
    run_prepare(plain, cleaning=cleaning, heldout_fraction=0)
    sources = {"s": {"path": str(tmp_path / "set"), "max_epochs": None}}
    stream = StreamSettings.model_validate({"seq_len": SEQ, "sources": sources})
    identity = {"s": read_manifest(tmp_path / "set").identity}
    record_stretch(tmp_path, stretch(folder).model_copy(update={"stream": stream, "data_sets": identity}))

    lines = (tmp_path / "first.jsonl").read_bytes().splitlines(keepends=True)
    short, repeated = (f"{tmp_path}/first.jsonl#byte={len(b''.join(lines[:row]))}" for row in (-2, -1))
    listed = rf"\. {tmp_path}/set/rejected/00000\d\.parquet lists it\."
    for name in (short, hashlib.blake2b(b"too short", digest_size=16).hexdigest()):
        told = rf"{name} is in no source of {tmp_path}: it was left out when the data set was prepared, by quality: "
        with pytest.raises(UserError, match=told + r"min_words \(2 < 3\)" + listed):
            when_seen(tmp_path, name)
    first = f"{tmp_path}/first.jsonl#byte={len(b''.join(lines[:5]))}"
    kept = when_seen(tmp_path, hashlib.blake2b(texts[5].encode(), digest_size=16).hexdigest())[0]
    (other,) = {first, repeated} - {kept.url}
    with pytest.raises(UserError, match=rf"by exact_duplicates: repeats train text \({kept.id} {kept.url}\)" + listed):
        when_seen(tmp_path, other)


def test_a_skipped_position_is_seen_by_no_step(run: Path) -> None:
    first = read_history(run).stretches[0]
    assert [first.step_of(position, 8) for position in (39, 40, 46, 47)] == [4, None, None, 4]
    assert first.seat(4, 47)[0] in (0, 1)


def test_the_history_forgets_what_a_resume_takes_anew(folder: Path, tmp_path: Path) -> None:
    whole = stretch(folder, ramp=(), skip_ranges=())
    record_stretch(tmp_path, whole)
    record_stretch(tmp_path, stretch(folder, ramp=(), skip_ranges=(), first_step=5, first_position=60, end_step=30))
    (one,) = read_history(tmp_path).stretches
    assert (one.first_step, one.end_step) == (0, 30), "the same reading goes on: one stretch"
    other = {"first_step": 10, "first_position": 120, "world_size": 4, "ramp": (), "skip_ranges": ()}
    record_stretch(tmp_path, stretch(folder, **other))
    record_stretch(tmp_path, stretch(folder, **{**other, "first_step": 8, "first_position": 96, "world_size": 1}))
    assert [(each.first_step, each.world_size) for each in read_history(tmp_path).stretches] == [(0, 2), (8, 1)]
    record_stretch(tmp_path, whole)
    assert [each.first_step for each in read_history(tmp_path).stretches] == [0], "a run that starts over"
    record_stretch(tmp_path, stretch(folder, ramp=(), skip_ranges=(), first_step=5, first_position=72, end_step=30))
    assert [each.first_position for each in read_history(tmp_path).stretches] == [0, 72], "it begins elsewhere"


def test_a_run_that_began_with_another_runs_checkpoint(folder: Path, tmp_path: Path) -> None:
    """``resume=PATH`` into a new folder: what came before was read by the other run."""
    record_stretch(tmp_path, stretch(folder, first_step=8, first_position=91))
    with pytest.raises(UserError, match=r"has the steps 9 to 20, not 8.* whose checkpoint it began with"):
        list(explain(tmp_path, 8, None, None, False))
    assert {row.step for row in explain(tmp_path, 9, None, None, False)} == {9}


def test_sources_in_another_order_than_the_alphabets(folder: Path, tmp_path: Path) -> None:
    """The order of the data hangs on that of the sources: the history must not sort them."""
    there = stretch(folder, ramp=(), skip_ranges=())
    content = there.stream.model_dump() | {"order": "windowed"}
    content["sources"] = {name: content["sources"][name] | {"weight": 1.0} for name in ("b", "a")}
    content["sources"]["aa"] = content["sources"]["a"]
    data_sets = {**there.data_sets, "aa": there.data_sets["a"]}
    stream = StreamSettings.model_validate(content)
    record_stretch(tmp_path, there.model_copy(update={"stream": stream, "data_sets": data_sets}))
    read = open_stream(stream, there.seed)
    located = read.order.locate(0, 12 * 10)
    expected = [(read.names[s], q) for s, q in zip(located.source.tolist(), located.sequence.tolist(), strict=True)]
    rows = [row for step in range(1, 11) for row in explain(tmp_path, step, None, None, False)]
    assert [(row.source, row.sequence) for row in sorted(rows, key=lambda row: row.position)] == expected


def test_sources_that_change_places_are_another_stretch(folder: Path, tmp_path: Path) -> None:
    """A resume that is told to accept it reads other data from there on, and what came before stays as it was."""
    there = stretch(folder, ramp=(), skip_ranges=())
    content = there.stream.model_dump()
    content["sources"] = dict(reversed(content["sources"].items()))
    turned = there.model_copy(update={"stream": StreamSettings.model_validate(content)})
    record_stretch(tmp_path, there)
    record_stretch(tmp_path, turned.model_copy(update={"first_step": 4, "first_position": there.start_of(4)}))
    kept = [(list(each.stream.sources), each.first_step) for each in read_history(tmp_path).stretches]
    assert kept == [(list(there.stream.sources), 0), (list(content["sources"]), 4)]


def test_a_document_of_millions_of_epochs_is_not_searched_in_each(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_stretch(tmp_path, stretch(folder, first_step=9, first_position=10**9, end_step=13, ramp=()))
    rows = [row for step in range(10, 14) for row in explain(tmp_path, step, None, None, False) if row.source == "b"]
    part, place, asked = rows[0].documents[0], Order.position_of, itertools.count()
    monkeypatch.setattr(Order, "position_of", lambda *arguments: (next(asked), place(*arguments))[1])
    seats = {(seen.step, seen.rank, seen.row, seen.epoch) for seen in when_seen(tmp_path, part.id)}
    expected = {(row.step, row.rank, row.row, row.epoch) for row in rows if part.id in {p.id for p in row.documents}}
    assert seats == expected
    assert rows[0].epoch > 10**6
    assert next(asked) < 200


def test_a_data_set_that_was_moved_is_found_where_the_run_has_found_it_since(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    record_stretch(tmp_path, stretch(moved))
    before = list(explain(tmp_path, 3, None, None, False))
    shutil.rmtree(moved)
    record_stretch(tmp_path, stretch(folder, first_step=8, first_position=91, world_size=1))
    assert list(explain(tmp_path, 3, None, None, False)) == before


def test_the_nodes_cache_need_not_hold_what_all_ranks_read_together(folder: Path, tmp_path: Path) -> None:
    """Each of two ranks had room for its windows on its own node; `explain` is one process."""
    with HttpServer(folder) as server:
        there = stretch(folder)
        # b is too small to be cut and is needed as a whole; a window of a touches up to two blocks of 1,024 bytes
        whole = int(open_stream(there.stream, 5).sources[1].shards.bytes.sum())
        content = there.stream.model_dump() | {
            "order": "windowed",
            "windows": {"strata": 2, "tokens": SEQ},
            "cache": {"folder": str(tmp_path / "cache"), "bytes": whole + 3_000},
        }
        for source in content["sources"].values():
            source["path"] = server.url
        stream = StreamSettings.model_validate(content)
        record_stretch(tmp_path, stretch(folder, stream=stream, world_size=64, micro_batch=1, global_batch=64, ramp=()))
        with pytest.raises(UserError, match="too small"):
            open_stream(stream, 5)
        open_stream(stream, 5, (0, 64))
        assert next(explain(tmp_path, 1, None, None, False)).step == 1


def test_wrong_questions(run: Path, tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="has the steps 1 to 20, not 21"):
        list(explain(run, 21, None, None, False))
    with pytest.raises(UserError, match="ran with ranks 0 to 1; there is no rank 2"):
        list(explain(run, 3, 2, None, False))
    with pytest.raises(UserError, match="ran with rows 0 to 5; there is no row 6"):
        list(explain(run, 3, 0, 6, False))
    with pytest.raises(UserError, match=f"holds no {HISTORY_FILE}"):
        list(explain(folder, 1, None, None, False))
    record_stretch(tmp_path, stretch(folder, data_sets={"a": "0" * 64, "b": "0" * 64}))
    with pytest.raises(UserError, match="is not the one that the run has read: its identity"):
        list(explain(tmp_path, 1, None, None, False))
    (tmp_path / HISTORY_FILE).write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        read_history(tmp_path)
    with pytest.raises(UserError, match="Restore it from a copy, or delete it"):
        record_stretch(tmp_path, stretch(folder, first_step=8))
    assert not issubclass(UserError, DataError)


def test_the_commands(run: Path) -> None:
    def call(*arguments: str) -> str:
        command = [sys.executable, "-m", "data_pipeline", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (line,) = call("explain", str(run), "--step", "9", "--rank", "1", "--row", "2", "--json").splitlines()
    row = json.loads(line)
    assert (row["step"], row["rank"], row["row"]) == (9, 1, 2)
    shown = call("explain", str(run), "--step", "9", "--rank", "1", "--row", "2", "--text")
    assert f"step 9, rank 1, row 2: position {row['position']:,} = source {row['source']!r}" in shown
    document = row["documents"][0]
    assert document["id"] in shown
    seen = json.loads(call("when-seen", str(run), document["id"], "--json"))
    assert (9, 1, 2) in [(each["step"], each["rank"], each["row"]) for each in seen]
    assert f"position {row['position']:,}, source" in call("when-seen", str(run), document["url"])
