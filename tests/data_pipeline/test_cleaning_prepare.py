"""Cleaning inside `prepare`: what stays, what goes, and that neither hangs on how the work was cut or interrupted."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import data_pipeline.prepare.rejected
from data_pipeline.cleaning import Cleaner
from data_pipeline.errors import UserError
from data_pipeline.inspect import inspect_dataset, render
from data_pipeline.manifest import Manifest, read_manifest, write_manifest
from data_pipeline.prepare import PrepareSettings, Share, merge, prepare, prepare_share
from data_pipeline.prepare.train_tokenizer import sample_text
from data_pipeline.settings import build_settings
from data_pipeline.shard_reading import read_documents, read_tokens
from data_pipeline.testing import tiny_tokenizer
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.verify import verify_dataset

SOURCES = {"first": "prose", "second": "verse", "third": "prose"}
HELDOUT, SEED = 0.2, 7


@dataclass(frozen=True)
class Record:
    """A line of a source, and what must become of it before duplicates are looked for."""

    source: str
    line: str
    fate: str
    text: str = ""

    @property
    def id(self) -> bytes:
        return blake2b(self.text.encode(), digest_size=16).digest()

    @property
    def heldout(self) -> bool:
        draw = blake2b(self.id, digest_size=8, key=b"heldout").digest()
        return int.from_bytes(draw, "little") < HELDOUT * 2**64

    @property
    def key(self) -> int:
        return int.from_bytes(blake2b(self.id, digest_size=8, key=SEED.to_bytes(8, "little")).digest(), "little")


def make_records() -> list[Record]:
    generator = np.random.default_rng(4)
    exam = "what is the answer to the great question of life the universe and everything else"

    def words(count: int) -> list[str]:
        return [f"w{number}" for number in generator.integers(0, 3000, count)]

    def record(fate: str, raw: str, text: str | None = None) -> Record:
        source = str(generator.choice(list(SOURCES)))
        return Record(source, json.dumps({"text": raw}), fate, raw if text is None else text)

    records = [record("keep", " ".join(words(int(generator.integers(20, 120))))) for _ in range(150)]
    for number in range(60):
        text = " ".join(words(150))
        records.append(record("keep", text))
        if number < 25:
            records += [record("keep", text) for _ in range(1 + number % 2)]
        elif number < 50:
            records.append(record("keep", text + f" end{number}"))
    for number in range(12):
        text = " ".join(words(30))
        records.append(record("keep", f"\ufeff{text} \r\ncafe\u0301 {number}\r\n", f"{text}\ncaf\u00e9 {number}"))
        records.append(record("quality/min_words", " ".join(words(9)) + " "))
        records.append(record("repetition/max_duplicate_lines", "\n".join(["same old line", *words(6)] * 4)))
        records.append(record("c4/lorem_ipsum", f"Lorem ipsum {' '.join(words(30))}"))
        records.append(record("decontaminate/exam.txt", f"{' '.join(words(20))} {exam.title()}? {' '.join(words(9))}"))
        records.append(record("empty", ["", "\r\n\u200b"][number % 2]))
        records.append(Record("second", "{broken", "source"))
    return [records[place] for place in generator.permutation(len(records))]


RECORDS = make_records()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("input")
    (folder / "given.model").write_bytes(tiny_tokenizer().model)
    (folder / "exam.txt").write_text("What is the answer to the great question of life, the universe and everything?")
    sources = {}
    for name, domain in SOURCES.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(record.line + "\n" for record in RECORDS if record.source == name))
        sources[name] = {"kind": "jsonl", "domain": domain, "files": [str(path)], "on_bad_record": "drop"}
    return {
        "output": str(folder / "set"),
        "seed": SEED,
        "tokenizer": {"path": str(folder / "given.model")},
        "sources": sources,
        "heldout_fraction": HELDOUT,
        "block_tokens": 64,
        "shard_tokens": 20_000,
        "part_bytes": 1 << 30,
        "processes": 1,
        "cleaning": {
            "normalise": {},
            "quality": {"min_words": 10, "min_mean_word_length": None},
            "repetition": {"max_top_2gram": None},
            "c4": {"min_sentences": None},
            "decontaminate": {"files": [str(folder / "exam.txt")]},
            "exact_duplicates": True,
            "near_duplicates": {"permutations": 64, "bands": 16},
            "rejected_characters": 50,
        },
    }


@pytest.fixture(scope="module")
def manifest(plain: dict[str, Any]) -> Manifest:
    return prepare(settings(plain))


def settings(plain: dict[str, Any], **changes: Any) -> PrepareSettings:
    return build_settings(PrepareSettings, {**plain, **changes}, "test")


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and ".prepare" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[start : start + 5]) for start in range(len(words) - 4)}


@dataclass
class Expected:
    kept: list[Record]
    exact: dict[str, list[Record]]
    near: dict[str, list[Record]]


def decide() -> Expected:
    """What must happen, by comparing all pairs."""
    order = list(SOURCES)

    def priority(record: Record) -> tuple[bool, int, int, bytes, int]:
        return not record.heldout, order.index(record.source), record.key, record.id, RECORDS.index(record)

    left = sorted((record for record in RECORDS if record.fate == "keep"), key=priority)
    gone: dict[str, dict[str, list[Record]]] = {"exact": {}, "near": {}}
    for stage in gone:
        kept: list[Record] = []
        seen = [(record.text, shingles(record.text)) for record in left]
        for place, record in enumerate(left):
            text, own = seen[place]
            similar = (
                text == seen[other][0]
                if stage == "exact"
                else len(own & seen[other][1]) >= 0.8 * len(own | seen[other][1])
                for other in range(place)
            )
            if any(similar):
                gone[stage].setdefault(record.source, []).append(record)
            else:
                kept.append(record)
        left = kept
    return Expected(left, gone["exact"], gone["near"])


EXPECTED = decide()


def stored(folder: Path, domain: str, split: str) -> list[str]:
    manifest, tokenizer = read_manifest(folder), Tokenizer.load(folder / "tokenizer.model")
    texts: list[str] = []
    for shard in manifest.select(domain, split):
        ids = read_tokens(folder, manifest, shard)
        ends = np.flatnonzero(ids == tokenizer.eos_id)
        texts += [tokenizer.decode(piece) for piece in np.split(ids[: ends[-1]], ends[:-1] + 1)]
    return texts


def test_what_stays(plain: dict[str, Any], manifest: Manifest) -> None:
    for domain in manifest.domains:
        for split in ("train", "heldout"):
            own = [r for r in EXPECTED.kept if SOURCES[r.source] == domain and r.heldout == (split == "heldout")]
            assert stored(Path(plain["output"]), domain, split) == [r.text for r in sorted(own, key=lambda r: r.key)]
            rows = [
                row
                for s in manifest.select(domain, split)
                for row in read_documents(Path(plain["output"]), s).to_pylist()
            ]
            assert [row["id"] for row in rows] == [r.id.hex() for r in sorted(own, key=lambda r: r.key)]
            tokens = sum(shard.tokens for shard in manifest.select(domain, split))
            assert len(manifest.select(domain, split)) == -(-tokens // plain["shard_tokens"])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    files = [folder / "rejected" / f"{file.name}.parquet" for file in read_manifest(folder).rejected]
    assert files == sorted((folder / "rejected").iterdir())
    return [row for path in files for row in pq.read_table(path).to_pylist()]


def fate_of(row: dict[str, Any]) -> str:
    if row["stage"] == "source":
        return "source"
    return f"{row['stage']}/{Path(row['reason']).name}"


def test_what_goes_is_counted_and_listed(plain: dict[str, Any], manifest: Manifest) -> None:
    rows = rows_of(Path(plain["output"]))
    early = [row for row in rows if "duplicates" not in row["stage"]]
    rejected = [r for name in SOURCES for r in RECORDS if r.source == name and r.fate not in ("keep", "empty")]
    assert [(row["source"], fate_of(row)) for row in early] == [(r.source, r.fate) for r in rejected]
    for row, record in zip(early, rejected, strict=True):
        if record.fate == "source":
            assert (row["id"], row["text"], row["text_bytes"]) == ("", "", 0)
        elif record.fate.startswith("decontaminate"):
            assert "first: 'what is the answer to the great question of life the universe and'" in row["detail"]
        assert row["text"] == record.text.strip()[:50] or record.fate in ("source", "quality/min_words")
    tokenizer = tiny_tokenizer()
    for name, domain in SOURCES.items():
        counts = manifest.sources[name]
        own = [r for r in RECORDS if r.source == name]
        kept = [r for r in EXPECTED.kept if r.source == name]
        assert counts["domain"] == domain
        assert counts["records"] == len(own)
        assert counts["documents"] == len(kept)
        assert counts["text_bytes"] == sum(len(r.text.encode()) for r in kept)
        assert counts["tokens"] == sum(len(tokenizer.encode_batch([r.text])[0]) + 1 for r in kept)
        changed = [r for r in own if r.fate == "keep" and json.loads(r.line)["text"] != r.text]
        assert counts["normalised_documents"] == len(changed)
        assert counts["empty_documents"] == sum(r.fate == "empty" for r in own)
        found = Counter(
            {f"{stage}/{Path(reason).name}": one["documents"] for stage, reasons in counts["rejected"].items()
             for reason, one in reasons.items()}
        )  # fmt: skip
        expected = Counter(r.fate for r in own if "/" in r.fate)
        assert {
            fate: count for fate, count in found.items() if "duplicates" not in fate and "source" not in fate
        } == expected
        assert sum(n for fate, n in found.items() if fate.startswith("source/")) == sum(r.fate == "source" for r in own)
        for stage, gone in (("exact_duplicates", EXPECTED.exact), ("near_duplicates", EXPECTED.near)):
            listed = [row for row in rows if row["stage"] == stage and row["source"] == name]
            assert Counter(row["id"] for row in listed) == Counter(r.id.hex() for r in gone.get(name, []))
            assert sum(n for fate, n in found.items() if fate.startswith(stage)) == len(gone.get(name, []))
            assert sum(one["text_bytes"] for one in counts["rejected"].get(stage, {}).values()) == sum(
                len(r.text.encode()) for r in gone.get(name, [])
            )
    assert sum(map(len, EXPECTED.exact.values())) > 30
    assert sum(map(len, EXPECTED.near.values())) > 20


def test_a_duplicates_row_names_what_it_repeats(plain: dict[str, Any], manifest: Manifest) -> None:
    by_id = {record.id.hex(): record for record in RECORDS if record.fate == "keep"}
    reasons = Counter()
    for row in rows_of(Path(plain["output"])):
        if "duplicates" in row["stage"]:
            gone, kept = by_id[row["id"]], by_id[row["detail"].split(" ")[0]]
            assert row["text"] == gone.text[:50]
            assert row["text_bytes"] == len(gone.text.encode())
            assert row["reason"] == f"repeats {'heldout' if kept.heldout else 'train'} text"
            assert kept.heldout or not gone.heldout
            if row["stage"] == "exact_duplicates":
                assert gone.text == kept.text
            else:
                assert len(shingles(gone.text) & shingles(kept.text)) > 0.8 * len(shingles(gone.text))
                assert kept in EXPECTED.kept
            reasons[gone.heldout, kept.heldout] += 1
    assert reasons[False, True] > 3
    assert reasons[True, True] > 3


def test_side_files_are_cut_by_rows(
    plain: dict[str, Any], manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_pipeline.prepare.rejected, "ROWS_PER_FILE", 7)
    found = prepare(settings(plain, output=str(tmp_path / "set"), part_bytes=9000))
    assert sorted({file.rows for file in found.rejected}) != [7]
    assert len(found.rejected) > 15
    assert all(0 < file.rows <= 16 for file in found.rejected)

    def place(row: dict[str, Any]) -> tuple[int, int]:
        key = 0 if "duplicates" not in row["stage"] else int(row["id"], 16)
        return list(SOURCES).index(row["source"]), key

    one, other = rows_of(Path(plain["output"])), rows_of(tmp_path / "set")
    early = [row for row in one if "duplicates" not in row["stage"]]
    assert other[: len(early)] == early
    assert sorted(other[len(early) :], key=place) == sorted(one[len(early) :], key=place)


def test_verify_reads_the_side_files(plain: dict[str, Any], tmp_path: Path) -> None:
    made = prepare(settings(plain, output=str(tmp_path / "set"), cleaning={"quality": {"min_words": 10}}))

    def found() -> list[str]:
        return [str(damage) for damage in verify_dataset(tmp_path / "set", 1)]

    assert found() == []
    sources = json.loads(json.dumps(made.sources))
    reasons = sources["first"]["rejected"]["quality"]
    rows, reasons["min_words"]["documents"] = reasons["min_words"]["documents"], 5
    reasons["max_words"] = {"documents": 3, "text_bytes": 1}
    write_manifest(tmp_path / "set", made.model_copy(update={"sources": sources}))
    assert found() == [
        f"rejected: lists {listed} records of source 'first' rejected by quality: {reason}, the manifest says {said}"
        for reason, listed, said in (("max_words", 0, 3), ("min_words", rows, 5))
    ]
    write_manifest(tmp_path / "set", made)
    (tmp_path / "set" / "rejected" / "000009.parquet").touch()
    assert found() == ["rejected/000009.parquet: is not in the manifest"]
    (tmp_path / "set" / "rejected" / "000009.parquet").unlink()
    path = tmp_path / "set" / "rejected" / "000000.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert found() == ["rejected/000000.parquet: its SHA-256 is not that of the manifest"]
    path.unlink()
    assert found() == ["rejected/000000.parquet: missing"]


def test_a_range_of_keys_that_loses_all_its_documents_is_no_shard(plain: dict[str, Any], tmp_path: Path) -> None:
    generator = np.random.default_rng(6)
    texts = [" ".join(f"w{n}" for n in generator.integers(0, 900, 60)) for _ in range(66)]
    sources = {}
    for name, domain, own in (("a", "one", texts[:60]), ("b", "other", texts)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in own))
        sources[name] = {"kind": "jsonl", "domain": domain, "files": [str(tmp_path / f"{name}.jsonl")]}
    common = {"output": str(tmp_path / "set"), "sources": sources, "heldout_fraction": 0, "shard_tokens": 250}
    made = prepare(settings(plain, **common, cleaning={"exact_duplicates": True}))
    shards = made.select("other", "train")
    assert sum(shard.documents for shard in shards) == 6
    assert len(shards) < -(-sum(shard.tokens for shard in shards) // 250)


def test_inspect_tells_it(plain: dict[str, Any], manifest: Manifest) -> None:
    """In one table, whose rows of a source add up to all its records."""
    lines = render(inspect_dataset(Path(plain["output"]))).splitlines()
    begin = lines.index("source               records     share      text bytes  what became of them") + 1
    tables: dict[str, dict[str, int]] = {}
    for line in lines[begin:]:
        tables.setdefault(line[:16].strip() or list(tables)[-1], {})[line[56:]] = int(line[16:28].replace(",", ""))
    assert list(tables) == list(SOURCES)
    for name, table in tables.items():
        about = manifest.sources[name]
        changed = table.pop("of them changed by normalisation")
        assert changed == about["normalised_documents"]
        assert table.pop("all") == sum(table.values()) == about["records"]
        assert table.pop("kept") == about["documents"]
        assert table.pop("empty") == about["empty_documents"]
        assert table == {
            f"rejected by {stage}: {reason}": counts["documents"]
            for stage, reasons in about["rejected"].items()
            for reason, counts in reasons.items()
        }
    kept = manifest.sources["first"]["documents"] / manifest.sources["first"]["records"]
    assert f"{kept:.2%}" in lines[begin]


def test_the_bytes_hang_on_content_alone(plain: dict[str, Any], manifest: Manifest, tmp_path: Path) -> None:
    expected = hashes(Path(plain["output"]))
    for name, changes in {"parts": {"part_bytes": 7000}, "processes": {"part_bytes": 60_000, "processes": 2}}.items():
        prepare(settings(plain, output=str(tmp_path / name), **changes))
        assert hashes(tmp_path / name) == expected


def test_tasks_write_the_same_bytes(plain: dict[str, Any], manifest: Manifest, tmp_path: Path) -> None:
    shared = settings(plain, output=str(tmp_path / "set"), part_bytes=9000)
    assert shared.passes == 5
    with pytest.raises(UserError, match="holds nothing to merge"):
        merge(shared)
    said = [prepare_share(shared, Share(task, 3)) for task in range(3)]
    assert "of all tasks' 1 items, 1 are missing (the first: duplicates exact" in said[2]
    with pytest.raises(UserError, match=r"can't be merged yet: of `find equal text`'s 1 items, 1 are missing"):
        merge(shared)
    for _ in range(shared.passes - 1):
        said += [prepare_share(shared, Share(task, 3)) for task in range(3)]
    assert said[-1] == "task 2 of 3: all 5 passes are done; publish the data set with --merge"
    merge(shared)
    assert hashes(tmp_path / "set") == hashes(Path(plain["output"]))


MOMENTS = ("parts/*.rejected.parquet", "duplicates/exact", "duplicates/band-0002", "shards/rejected-*.json")


def test_a_killed_prepare_continues_to_the_same_bytes(
    plain: dict[str, Any], manifest: Manifest, tmp_path: Path
) -> None:
    config = tmp_path / "killed.yaml"
    config.write_text(json.dumps({**plain, "output": str(tmp_path / "killed"), "part_bytes": 9000}))
    command = [sys.executable, "-m", "data_pipeline", "prepare", str(config)]
    for moment in MOMENTS:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list((tmp_path / "killed" / ".prepare").glob(moment)):
            time.sleep(0.0005)
        process.kill()
        process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert hashes(tmp_path / "killed") == hashes(Path(plain["output"]))


def test_without_cleaning_nothing_changes(plain: dict[str, Any], tmp_path: Path) -> None:
    made = prepare(settings(plain, output=str(tmp_path / "set"), cleaning={}))
    assert sum(source["documents"] for source in made.sources.values()) == sum(
        json.loads(record.line)["text"] != "" for record in RECORDS if record.fate != "source"
    )
    assert [list(source["rejected"]) for source in made.sources.values()] == [[], ["source"], []]


def test_changed_evaluation_texts_are_another_data_set(
    plain: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exam = tmp_path / "exam.txt"
    exam.write_text("one two three four five six seven eight nine ten eleven twelve thirteen\n\nyes\n\nno")
    cleaning = {"decontaminate": {"files": [str(exam)]}}
    shared = settings(plain, output=str(tmp_path / "set"), cleaning=cleaning)
    prepare_share(shared, Share(0, 2))
    assert "warning: 2 evaluation texts are shorter than decontaminate.min_units" in capsys.readouterr().err
    exam.write_text(exam.read_text() + " fourteen")
    with pytest.raises(UserError, match=r"was begun with something else: evaluation_texts\..*exam\.txt was "):
        prepare_share(shared, Share(1, 2))
    exam.unlink()
    with pytest.raises(UserError, match=r"decontaminate\.files: '.*exam\.txt' matches no file"):
        prepare_share(shared, Share(1, 2))


def test_a_source_of_which_nothing_stays_is_told(plain: dict[str, Any], tmp_path: Path) -> None:
    cleaning = {"quality": {"min_words": 1000}}
    with pytest.raises(
        UserError, match=r"source 'first' holds no document but .* \(\d+ by quality: min_words\)\. Take it out"
    ):
        prepare(settings(plain, output=str(tmp_path / "set"), cleaning=cleaning))


def test_the_tokenizer_is_trained_on_clean_training_text(plain: dict[str, Any]) -> None:
    """Held-out documents are those whose text is held out after normalisation, as in the data set."""
    chosen = settings(plain)
    sample = filter(None, sample_text(chosen.sources, 10**8, HELDOUT, Cleaner(chosen.cleaning), chosen.storage))
    kept = [r for name in SOURCES for r in RECORDS if r.source == name and r.fate == "keep" and not r.heldout]
    assert list(sample) == [record.text for record in kept]
