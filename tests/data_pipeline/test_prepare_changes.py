"""What changes under the feet of a `prepare`: its input, its settings, its libraries, and what it has written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import data_pipeline.prepare.agreement
import data_pipeline.prepare.parts
from data_pipeline.errors import DataError, HeadraceError, UserError
from data_pipeline.prepare import PrepareSettings, Share, make_tokenizer, merge, prepare, prepare_share
from data_pipeline.prepare.accounts import check_totals
from data_pipeline.prepare.checked_files import read_record
from data_pipeline.prepare.workspace import open_workspace
from data_pipeline.testing import tiny_tokenizer
from data_pipeline.verify import verify_dataset
from tests.data_pipeline.prepared import build, hashes, make_texts, plain_settings, run, write_jsonl


@pytest.fixture
def plain(tmp_path: Path) -> dict[str, Any]:
    """Two sources of many parts each."""
    return plain_settings(tmp_path, {"first": ("one", make_texts(120, 1)), "second": ("two", make_texts(120, 2))})


def test_the_sources_can_not_change_places_on_the_way(plain: dict[str, Any]) -> None:
    """Parts are numbered over all sources: in another order some would be read twice, and some never."""
    prepare_share(build(plain), Share(0, 2))
    turned = build(plain, sources=dict(reversed(plain["sources"].items())))
    with pytest.raises(UserError, match=r"source_order was \['first', 'second'\], now it is \['second', 'first'\]"):
        prepare(turned)
    assert [source["documents"] for source in prepare(build(plain)).sources.values()] == [120, 120]


def refused(settings: PrepareSettings, tasks: int, match: str) -> None:
    """All of ``tasks`` tasks, or (0) a plain prepare, say what is wrong."""
    for share in [Share(task, tasks) for task in range(tasks)] or [None]:
        with pytest.raises(UserError, match=match):
            prepare_share(settings, share) if share else prepare(settings)


@pytest.mark.parametrize("tasks", [0, 2])
def test_what_fails_before_anything_is_made_can_be_corrected(plain: dict[str, Any], tmp_path: Path, tasks: int) -> None:
    """Nothing stays of what was wrong: neither settings nor a tokenizer that was only copied."""
    wrong = {name: {**source, "text_field": "body"} for name, source in plain["sources"].items()}
    refused(build(plain, sources=wrong), tasks, "has no field 'body'; its fields: text")
    other = tmp_path / "other.model"
    other.write_bytes(tiny_tokenizer(vocab_size=400).model)
    made = run(plain, tokenizer={"path": str(other)} if not tasks else plain["tokenizer"])
    assert sum(source["documents"] for source in made.sources.values()) == 240


def test_what_fails_while_a_tokenizer_is_trained_can_be_corrected(plain: dict[str, Any]) -> None:
    train = {"train": {"model_type": "bpe", "vocab_size": 330}}
    wrong = {name: {**source, "text_field": "body"} for name, source in plain["sources"].items()}
    refused(build(plain, sources=wrong, tokenizer=train), 0, "has no field 'body'")
    run(plain, tokenizer=train)


def test_what_was_made_binds(plain: dict[str, Any], tmp_path: Path) -> None:
    """Parts, and a tokenizer that was there before or was trained."""
    settings = build(plain)
    make_tokenizer(settings)
    tokenizer = (tmp_path / "set" / "tokenizer.model").read_bytes()
    wrong = {name: {**source, "text_field": "body"} for name, source in plain["sources"].items()}
    refused(build(plain, sources=wrong), 0, "has no field 'body'")
    assert (tmp_path / "set" / "tokenizer.model").read_bytes() == tokenizer
    refused(build(plain, sources={**plain["sources"], "second": wrong["second"]}), 0, "has no field 'body'")
    refused(settings, 0, r"second\.text_field was 'body', now it is 'text'")


def test_what_a_killed_start_was_told_binds_though_it_made_nothing(plain: dict[str, Any], tmp_path: Path) -> None:
    """Its processes may still be at work."""
    prepare_share(build(plain), Share(0, 2))
    for path in (tmp_path / "set" / ".prepare" / "parts").iterdir():
        path.unlink()
    for _ in range(2):
        refused(build(plain, seed=8), 0, r"settings\.seed was 0, now it is 8")
    run(plain)


def test_what_another_task_may_work_by_is_not_taken_back(plain: dict[str, Any], tmp_path: Path) -> None:
    wrong = {name: {**source, "text_field": "body"} for name, source in plain["sources"].items()}
    with open_workspace(tmp_path / "set", Share(1, 2)):
        with pytest.raises(UserError, match="has no field 'body'"):
            prepare_share(build(plain, sources=wrong), Share(0, 2))
        with pytest.raises(UserError, match=r"text_field was 'body', now it is 'text'"):
            prepare_share(build(plain), Share(0, 2))


def test_the_order_of_the_sources_stands_in_the_manifest(plain: dict[str, Any]) -> None:
    """Among duplicates the source named first wins, and an object of JSON has no order."""
    assert tuple(run(plain).settings["source_order"]) == ("first", "second")


def test_a_tokenizer_is_trained_on_sources_in_their_order(plain: dict[str, Any]) -> None:
    train = {"train": {"model_type": "bpe", "vocab_size": 330}}
    prepare_share(build(plain, tokenizer=train), Share(0, 2))
    for record in (Path(plain["output"]) / ".prepare").glob("plan.json"):
        record.unlink()
    with pytest.raises(UserError, match="source_order was"):
        prepare(build(plain, tokenizer=train, sources=dict(reversed(plain["sources"].items()))))


def meanwhile(monkeypatch: pytest.MonkeyPatch, change: Callable[[], None], before: str) -> None:
    """Let ``change`` happen while part ``before`` is tokenised."""
    tokenise = data_pipeline.prepare.parts._encode

    def changed(batch: Any, tokenizer: Any, job: Any, counts: Any) -> Any:
        if job.label == before:
            change()
        return tokenise(batch, tokenizer, job, counts)

    monkeypatch.setattr(data_pipeline.prepare.parts, "_encode", changed)


def test_a_file_that_changes_while_it_is_read_is_told(
    plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where it keeps its size, so that parts and lines lie where they lay."""
    path = tmp_path / "second.jsonl"
    content, time = path.read_bytes(), path.stat().st_mtime_ns
    with monkeypatch.context() as patched:
        meanwhile(patched, lambda: path.write_bytes(content.replace(b"fox", b"cat")), "part 000007")
        with pytest.raises(
            UserError, match=rf"second\.jsonl changed while it was read: it was {len(content)} bytes, m"
        ):
            run(plain)
    with pytest.raises(UserError, match=r"was begun with something else: input\.second\."):
        run(plain)
    path.write_bytes(content)
    os.utime(path, ns=(time, time))
    run(plain)
    run(plain, output=str(tmp_path / "other"))
    assert hashes(tmp_path / "set") == hashes(tmp_path / "other")


def test_a_file_that_was_touched_can_be_put_back(plain: dict[str, Any], tmp_path: Path) -> None:
    """The message says what differs, and holds the command that helps."""
    path = (tmp_path / "second.jsonl").rename(tmp_path / "a second.jsonl")
    sources = {**plain["sources"], "second": {**plain["sources"]["second"], "files": [str(path)]}}
    size = path.stat().st_size
    os.utime(path, ns=(0, 1_700_000_000_000_000_789))
    prepare_share(build(plain, sources=sources), Share(0, 2))
    path.touch()
    moment = r"20\d\d-\d\d-\d\d \S+ UTC"
    said = (
        rf"jsonl still has {size:,} bytes, but was modified at {moment} and not at {moment} \(if it holds what it held"
    )
    with pytest.raises(UserError, match=said) as told:
        run(plain, sources=sources)
    command = str(told.value).split("`")[1]
    assert command.startswith("touch -d @")
    content = path.read_bytes()
    path.write_bytes(content + b"\n")
    with pytest.raises(UserError, match=rf"second\.jsonl had {size:,} bytes, now it has {size + 1:,}\. Give another"):
        run(plain, sources=sources)
    path.write_bytes(content)
    subprocess.run(command, shell=True, check=True)
    run(plain, sources=sources)


def test_a_file_that_goes_away_while_it_is_read_is_told(
    plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meanwhile(monkeypatch, (tmp_path / "second.jsonl").unlink, "part 000007")
    with pytest.raises(UserError, match=r"second\.jsonl changed while it was read: it was .*, now it is gone\. Put"):
        run(plain)


def test_what_happens_to_a_file_that_was_read_is_nobodys_business(
    plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meanwhile(monkeypatch, lambda: write_jsonl(tmp_path / "first.jsonl", make_texts(500, 9)), "part 000007")
    made = run(plain)
    assert [source["documents"] for source in made.sources.values()] == [120, 120]


def test_a_data_set_of_the_library_that_changes_on_the_way_is_told(
    plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every part opens it anew, and would read what is there then."""
    pytest.importorskip("datasets")
    files = [tmp_path / f"{number}.json" for number in range(2)]
    for number, path in enumerate(files):
        write_jsonl(path, make_texts(20, 10 + number))
    library = {"kind": "datasets", "domain": "one", "path": "json", "data_files": [str(path) for path in files]}
    sources = {"library": library, "second": plain["sources"]["second"]}
    with monkeypatch.context() as patched:
        meanwhile(patched, lambda: write_jsonl(files[1], make_texts(5, 12)), "part 000000")
        with pytest.raises(UserError, match=r"what source 'library' reads changed while it was read\. Put it back"):
            run(plain, sources=sources)
    assert not (tmp_path / "set" / "manifest.json").exists()
    assert run(plain, sources=sources, output=str(tmp_path / "again")).sources["library"]["documents"] == 25


def test_evaluation_texts_that_change_on_the_way_are_told(
    plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exam = tmp_path / "exam.txt"
    exam.write_text("one two three four five six seven eight nine ten")
    meanwhile(monkeypatch, lambda: exam.write_text(exam.read_text() + " eleven") and None, "part 000007")
    with pytest.raises(UserError, match=r"evaluation texts of `decontaminate\.files` changed while documents were"):
        run(plain, cleaning={"decontaminate": {"files": [str(exam)]}})
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_tasks_with_other_libraries_are_refused(plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another Unicode normalises otherwise, another SentencePiece may cut otherwise. A complete set needs neither."""
    prepare_share(build(plain), Share(0, 2))
    with monkeypatch.context() as patched:
        patched.setattr(data_pipeline.prepare.agreement.unicodedata, "unidata_version", "99.0.0")
        with pytest.raises(UserError, match=r"was begun with something else: unicode was '[0-9.]+', now it is '99\.0"):
            prepare_share(build(plain), Share(1, 2))
    made = run(plain)
    assert made.versions.keys() == {"headrace", "sentencepiece", "unicode"}
    monkeypatch.setattr(data_pipeline.prepare.agreement.unicodedata, "unidata_version", "99.0.0")
    assert run(plain) == made


ENVIRONMENTS: list[dict[str, str]] = [
    {"PYTHONHASHSEED": "1", "LC_ALL": "C", "OMP_NUM_THREADS": "1", "TZ": "Asia/Tokyo"},
    {"PYTHONHASHSEED": "2", "LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8", "OMP_NUM_THREADS": "3"},
]


def test_the_bytes_do_not_hang_on_the_environment(plain: dict[str, Any], tmp_path: Path) -> None:
    """Hash seed, locale, time zone, threads; with a trained tokenizer, cleaning, names and texts of many letters."""
    texts = [f"\u0130stanbul \u0131\u015f\u0131k {text}" for text in make_texts(40, 3)]
    write_jsonl(tmp_path / "\u00e4 \u4e2d.jsonl", [*texts, *texts[:9], *(f"{text} more" for text in texts[:9])])
    changes = {
        "sources": {"all": {**plain["sources"]["first"], "files": [str(tmp_path / "*.jsonl")]}},
        "tokenizer": {"train": {"model_type": "unigram", "vocab_size": 330}},
        "cleaning": {"normalise": {}, "exact_duplicates": True, "near_duplicates": {"permutations": 16, "bands": 4}},
    }
    run(plain, **changes)
    expected = hashes(tmp_path / "set")
    config = tmp_path / "config.yaml"
    for number, environment in enumerate(ENVIRONMENTS):
        output = tmp_path / f"set{number}"
        config.write_text(json.dumps({**plain, **changes, "output": str(output), "processes": 1 + number}))
        command = [sys.executable, "-m", "data_pipeline", "prepare", str(config)]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, **environment})
        assert hashes(output) == expected, environment


def test_file_names_that_mean_something_else_here_are_refused(plain: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps(plain))
    command = [sys.executable, "-m", "data_pipeline", "prepare", str(tmp_path / "config.yaml")]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "file names are read as ascii under this locale" in done.stderr
    assert "Set PYTHONUTF8=1" in done.stderr


@pytest.mark.parametrize("lost", ["shards/000001.tar", "shards/000002.docs.parquet", "rejected/000000.parquet"])
def test_what_was_written_and_is_gone_is_written_again(plain: dict[str, Any], tmp_path: Path, lost: str) -> None:
    """A completion record is no proof that the file is there."""
    cleaned = build(plain, cleaning={"quality": {"min_words": 5, "min_mean_word_length": None}})
    for _ in range(cleaned.passes):
        prepare_share(cleaned, Share(0, 1))
    path = tmp_path / "set" / lost
    path.write_bytes(path.read_bytes()[:-100]) if lost.endswith("1.tar") else path.unlink()
    with pytest.raises(UserError, match=rf"set: {lost} \(1 files\) were written, but are missing or cut now\. Nothing"):
        merge(cleaned)
    assert not (tmp_path / "set" / "manifest.json").exists()
    prepare(cleaned)
    assert verify_dataset(tmp_path / "set", 1) == []


def test_every_total_is_held_against_what_the_sources_gave(plain: dict[str, Any]) -> None:
    made = run(plain, cleaning={"quality": {"min_words": 5, "min_mean_word_length": None}})
    check_totals(made)
    for what in ("documents", "tokens", "text_bytes"):
        sources = {**made.sources, "first": {**made.sources["first"], what: made.sources["first"][what] + 1}}
        with pytest.raises(
            HeadraceError, match=rf"the sources gave [\d,]+ {what} and the shards hold [\d,]+\. Nothing"
        ):
            check_totals(made.model_copy(update={"sources": sources}))
    with pytest.raises(HeadraceError, match=r"gave [\d,]+ rejected records and the files of rejected records hold 0\."):
        check_totals(made.model_copy(update={"rejected": ()}))


def test_a_task_reads_one_record_of_all_parts(plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as many as there are parts, which all tasks would fetch over the network."""
    prepare_share(build(plain), Share(0, 1))
    parts = Path(plain["output"]) / ".prepare" / "parts"
    records = sorted(parts.glob("??????.json"))
    assert len(records) > 8
    assert read_record(parts.parent / "part_records.json") == [read_record(path) for path in records]
    for path in records:
        path.write_bytes(b"")
    made = run(plain)
    assert sum(source["documents"] for source in made.sources.values()) == 240
    assert not (parts.parent / "part_records.json").exists()


def test_a_complete_set_is_left_alone_and_says_so(plain: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    made = run(plain)
    capsys.readouterr()
    said = f"{plain['output']} is complete already: nothing was done. For another data set give another `output`"
    for again in (prepare, merge):
        assert again(build(plain)) == made
        assert said in capsys.readouterr().err
    assert said in prepare_share(build(plain), Share(1, 3))


def test_a_complete_set_that_lost_files_is_no_success(plain: dict[str, Any]) -> None:
    """Restored from a copy, it is complete again; nothing was touched meanwhile."""
    made = run(plain)
    folder = Path(plain["output"])
    for name in ("000000.tar", "000001.idx", "000002.docs.parquet"):
        path = folder / "shards" / name
        content = path.read_bytes()
        for damage in (path.unlink, lambda path=path: os.truncate(path, 0 if path.suffix == ".parquet" else 100)):
            damage()
            said = rf"set was complete, but shards/{name} \(1 files\) are missing or have another size now\. Restore"
            for again in (prepare, merge, lambda settings: prepare_share(settings, Share(1, 3))):
                with pytest.raises(DataError, match=said):
                    again(build(plain))
            path.write_bytes(content)
    assert run(plain) == made
    for path in (folder / "shards").glob("*.tar"):
        path.unlink()
    said = rf"shards/000000\.tar, .*000002\.tar \.\.\. \({len(made.shards)} files\) .*--rebuild-sidecars {folder}`"
    with pytest.raises(DataError, match=said):
        run(plain)


def test_a_domain_of_which_everything_is_held_out_is_said(
    plain: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(plain, heldout_fraction=0.999999)
    assert "warning: domain 'one' has no training document: all of its few fell into" in capsys.readouterr().err
