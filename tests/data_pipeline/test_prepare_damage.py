"""What `prepare` leaves to its own passes is damaged between them: no pass takes it for what was written."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import data_pipeline.files
import data_pipeline.prepare.run as passes
from data_pipeline.errors import DataError, UserError
from data_pipeline.files import publish_json
from data_pipeline.prepare import PrepareSettings, Share, make_tokenizer, merge, prepare
from data_pipeline.prepare.checked_files import publish_record, read_record
from data_pipeline.prepare.workspace import open_workspace
from data_pipeline.verify import verify_dataset
from tests.data_pipeline.prepared import build, hashes, make_texts, plain_settings

FILES = {
    "parts/*.json": "after tokenise",
    "parts/*.docs": "after tokenise",
    "parts/*.minhash": "before find similar text",
    "parts/*.bands": "before find similar text",
    "duplicates/exact": "before find similar text",
    "duplicates/band-*": "before choose what stays",
    "duplicates/duplicates.json": "after choose what stays",
    "parts/*.drop": "after choose what stays",
    "part_records.json": "before find equal text",
    "shard_plan.json": "before write shards",
    "shard_runs.json": "before write shards",
    "parts/*.tokens": "before write shards",
    "parts/*.urls": "before write shards",
    "parts/*.metadata": "before write shards",
    "parts/*.rejected.parquet": "before write shards",
    "shards/0*.json": "after write shards",
    "shards/rejected-*.json": "after write shards",
    "plan.json": "before write shards",
    "versions.json": "before write shards",
    "tokenizer.json": "before write shards",
    "tokenizer_sha256.json": "before write shards",
}
"""Of every kind of file in `.prepare` the moment from which on it is read."""

AGREED = ("plan.json", "versions.json", "tokenizer.json", "tokenizer_sha256.json")
"""What was asked for, and the tokenizer, can't be made again."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two sources through all passes, in few parts: some texts are too short, equal or alike; all have a url and
    something else."""
    folder = tmp_path_factory.mktemp("damage")
    first = ["few", *make_texts(40, 1)]
    second = [*first[1:10], *(f"{text} x" for text in first[10:20]), "short", "", *make_texts(10, 9)]
    described = plain_settings(folder, {"first": ("d", first), "second": ("e", second)})
    for name, source in described["sources"].items():
        path = folder / f"{name}.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**r, "at": f"{name}/{n}", "n": n}) + "\n" for n, r in enumerate(records)))
        source.update(url_field="at", metadata_fields=["n"])
    quality = {"min_words": 2, "min_characters": None, "min_mean_word_length": None, "min_alphabetic_words": None}
    near = {"bands": 2, "permutations": 8}
    described["cleaning"] = {"quality": quality, "exact_duplicates": True, "near_duplicates": near}
    return {**described, "part_bytes": 8000, "shard_tokens": 5000}


@pytest.fixture(scope="module")
def moments(plain: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of one undisturbed `prepare` as it was before and after each pass, and when all was done."""
    kept = tmp_path_factory.mktemp("moments")
    settings = build(plain)
    output = Path(settings.output)

    def keep(moment: str) -> None:
        shutil.copytree(output, kept / moment)

    with open_workspace(output) as workspace:
        work = passes._begin(settings, workspace, Share())
        for stage in work.stages():
            keep(f"before {stage.name}")
            work.advance(stage)
            keep(f"after {stage.name}")
        work.publish()
    keep("done")
    return {path.name: path for path in kept.iterdir()}


def turn_a_bit(path: Path, place: float = 0.5, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= bit
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def exchange(path: Path) -> None:
    """With another one of its kind."""
    kind = path.parent.glob(f"*{path.suffix}" if path.parent.name == "parts" else f"{path.name[:1]}*")
    content = path.read_bytes()
    other = next(other for other in sorted(kind, reverse=True) if other.read_bytes() != content)
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def problem(settings: PrepareSettings) -> str | None:
    """What a `prepare` says of damage, if it is not done."""
    try:
        prepare(settings)
    except DataError as error:
        return str(error)
    return None


SOLE = ("duplicates/exact", "duplicates/duplicates.json", "part_records.json", "shard_plan.json", "shard_runs.json")
DAMAGES = [
    pytest.param(pattern, damage, id=f"{pattern}-{damage.__name__}")
    for pattern in FILES
    for damage in (turn_a_bit, cut, exchange, Path.unlink)
    if damage is not exchange or pattern not in (*AGREED, *SOLE)
]


@pytest.mark.parametrize(("pattern", "damage"), DAMAGES)
def test_damage_is_an_error_that_names_the_file_or_changes_nothing(
    plain: dict[str, Any], moments: dict[str, Path], tmp_path: Path, pattern: str, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(moments[FILES[pattern]], folder)
    path = next(path for path in sorted((folder / ".prepare").glob(pattern)) if path.stat().st_size)
    damage(path)
    settings = build(plain, output=str(folder))
    told = problem(settings)
    if told is None:
        assert damage is Path.unlink, "was not noticed"
    else:
        assert str(path) in told or damage is exchange  # one of the two is read first
        assert not (folder / "manifest.json").exists()
        if pattern in AGREED:
            assert f"Delete {folder} and prepare again." in told
            return
        assert "start the same command again" in told
        assert problem(settings) is None or damage is exchange
        assert problem(settings) is None
    assert hashes(folder) == hashes(moments["done"])


@pytest.mark.parametrize("suffix", ["tokens", "urls"])
def test_damage_that_only_the_files_of_rejected_records_meet(
    plain: dict[str, Any], moments: dict[str, Path], tmp_path: Path, suffix: str
) -> None:
    """Of duplicates they read text and origin, one by one; here all shards are written already."""
    folder = tmp_path / "set"
    shutil.copytree(moments["after write shards"], folder)
    for record in (folder / ".prepare" / "shards").glob("rejected-*.json"):
        record.unlink()
    for path in (folder / ".prepare" / "parts").glob(f"*.{suffix}"):
        path.write_bytes(b"\5\0" * (path.stat().st_size // 2) + b"\5" * (path.stat().st_size % 2))
    told = problem(build(plain, output=str(folder)))
    assert told is not None
    assert f".{suffix} does not hold what was written" in told


@pytest.mark.campaign
@pytest.mark.parametrize("pattern", FILES)
def test_bits_that_turn_anywhere(plain: dict[str, Any], moments: dict[str, Path], tmp_path: Path, pattern: str) -> None:
    """16 of each kind of file: noticed, or the same data set."""
    draw = random.Random(pattern)
    noticed = 0
    for trial in range(16):
        folder = tmp_path / f"{trial}" / "set"
        shutil.copytree(moments[FILES[pattern]], folder)
        path = draw.choice([path for path in (folder / ".prepare").glob(pattern) if path.stat().st_size])
        turn_a_bit(path, draw.random(), 1 << draw.randrange(8))
        told = problem(build(plain, output=str(folder)))
        noticed += told is not None
        assert str(path) in told if told else hashes(folder) == hashes(moments["done"])
    assert noticed == 16 or pattern == "parts/*.minhash"  # signatures of documents that share no band are not read


def test_a_folder_of_an_older_version_is_refused(
    plain: dict[str, Any], moments: dict[str, Path], tmp_path: Path
) -> None:
    """One whose records have no sums, and one that says so."""
    folder = tmp_path / "set"
    shutil.copytree(moments["before write shards"], folder)
    plan = folder / ".prepare" / "plan.json"
    content = plan.read_bytes()
    publish_json(plan, read_record(plan))
    said = rf"plan\.json was written by an older version of headrace, .*\. Nothing was published\. Delete {folder} and"
    with pytest.raises(DataError, match=said):
        prepare(build(plain, output=str(folder)))
    plan.write_bytes(content)
    versions = folder / ".prepare" / "versions.json"
    publish_record(versions, {**read_record(versions), "format": 1})
    with pytest.raises(UserError, match=r"format was 1, now it is 2\. Give another `output` folder, delete this one"):
        prepare(build(plain, output=str(folder)))


@pytest.mark.parametrize("damage", [turn_a_bit, Path.unlink])
def test_a_complete_set_without_a_record_of_what_was_asked_for(
    plain: dict[str, Any], moments: dict[str, Path], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(moments["done"], folder)
    damage(folder / ".prepare" / "plan.json")
    with pytest.raises(DataError, match=rf"The data set {folder} is complete without it, .* Use it as it is, or give"):
        prepare(build(plain, output=str(folder)))
    assert verify_dataset(folder, 1) == []


@pytest.mark.parametrize("moment", ["after tokenise", "done"])
def test_a_tokenizer_that_is_not_the_one_it_was(
    plain: dict[str, Any], moments: dict[str, Path], tmp_path: Path, moment: str
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(moments[moment], folder)
    path = folder / "tokenizer.model"
    content = path.read_bytes()
    for place in (0, 0.1, 0.5, 0.9):
        turn_a_bit(path, place)
        with pytest.raises(
            DataError, match=rf"{path} was damaged or replaced: .* Put that one back, or delete the fol"
        ):
            prepare(build(plain, output=str(folder)))
        path.write_bytes(content)
    prepare(build(plain, output=str(folder)))


@pytest.mark.parametrize("made", ["taken", "trained"])
def test_a_tokenizer_that_is_not_the_one_it_was_before_anything_is_made_with_it(
    plain: dict[str, Any], tmp_path: Path, made: str
) -> None:
    trained = {"tokenizer": {"train": {"model_type": "bpe", "vocab_size": 300}}} if made == "trained" else {}
    settings = build(plain, output=str(tmp_path / "set"), **trained)
    tokenizer, path = make_tokenizer(settings), tmp_path / "set" / "tokenizer.model"
    path.write_bytes(tokenizer.model.replace(b"the", b"thd", 1))
    assert path.read_bytes() != tokenizer.model
    with pytest.raises(DataError, match=rf"{path} was damaged or replaced: .* Put that one back, or delete the fol"):
        prepare(settings)
    path.write_bytes(tokenizer.model)
    assert prepare(settings).tokenizer_sha256 == tokenizer.sha256


@pytest.mark.parametrize("name", ["000001.tar", "000001.idx", "000001.docs.parquet", "000000.parquet"])
def test_a_bit_that_turns_in_a_finished_shard_is_found_by_verify(
    plain: dict[str, Any], moments: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Publishing does not read what was written, nor takes its hashes from there."""
    folder = tmp_path / "set"
    shutil.copytree(moments["after write shards"], folder)
    turn_a_bit(next(folder.glob(f"*/{name}")), 0.2)
    merge(build(plain, output=str(folder)))
    assert {damage.file.partition("/")[2] for damage in verify_dataset(folder, 1)} == {name}


def test_hashes_are_of_what_was_to_be_written(
    plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit that turns on the way to the disk has no hash of its own."""
    replace = os.replace

    def published(source: Path, target: Path) -> None:
        if target.parent.name in ("shards", "rejected") and target.suffix != ".json":
            turn_a_bit(source, 0.2)
        replace(source, target)

    monkeypatch.setattr(data_pipeline.files.os, "replace", published)
    folder = tmp_path / "set"
    prepare(build(plain, output=str(folder)))
    monkeypatch.undo()
    written = {str(path.relative_to(folder)) for path in folder.glob("[sr]*/*")}
    assert len(written) > 9
    assert {damage.file for damage in verify_dataset(folder, 1)} == written


@pytest.mark.parametrize(
    "name", ["part_records.json", "shard_plan.json", "parts/000000.json", "duplicates/exact", "shards/000000.json"]
)
def test_any_work_that_is_there_was_begun_with_something(tmp_path: Path, name: str) -> None:
    """So a start that fails takes nothing back of what that was, whatever else was lost."""
    with open_workspace(tmp_path / "set") as workspace:
        assert not workspace.begun
        (workspace.work / name).touch()
        assert workspace.begun
