"""Which files a source reads, and what is refused before it does."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from data_pipeline.prepare import PrepareSettings
from data_pipeline.settings import build_settings
from data_pipeline.sources.inputs import kind_of_name
from tests.data_pipeline.prepared import make_texts, plain_settings, run
from tests.data_pipeline.read_sources import jsonl, read, texts, write_jsonl


def test_globs_are_sorted_and_take_a_file_once(tmp_path: Path) -> None:
    for name in ("b", "a", "sub/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    source = jsonl(tmp_path / "**/*.jsonl", tmp_path / "b.jsonl")
    assert texts(read(source, 100)) == ["a", "b", "sub/c"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"input '.*none-\*\.jsonl' \(source of domain 'd'\) names no file, seen from"):
        jsonl(tmp_path / "none-*.jsonl").parts(100)


def test_an_unknown_kind_or_key_is_refused() -> None:
    def build(**source: object) -> None:
        sources = {"s": {"domain": "d", **source}}
        build_settings(PrepareSettings, {"output": "x", "tokenizer": {"path": "t"}, "sources": sources}, "a.yaml")

    with pytest.raises(UserError, match=r"a\.yaml: unknown kind 'csv' of 'sources\.s'"):
        build(kind="csv")
    with pytest.raises(UserError, match=r"unknown key 'sources\.s\.text_feld' .*did you mean 'text_field'"):
        build(kind="jsonl", files=["a"], text_feld="b")
    with pytest.raises(UserError, match=r"'sources\.s\.domain' = 'a b'"):
        build(kind="jsonl", files=["a"], domain="a b")


def test_a_file_under_several_names_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    os.symlink("a.jsonl", tmp_path / "link.jsonl")
    os.symlink(tmp_path, tmp_path / "sub" / "up")
    names = ["a.jsonl", "./a.jsonl", "sub/../a.jsonl", str(tmp_path / "a.jsonl"), "link.jsonl", "{a,a}.jsonl"]
    source = jsonl(*map(Path, ["b.jsonl"])).model_copy(update={"files": (*names, "sub/up/*.jsonl", "b.jsonl")})
    assert sorted(texts(read(source, 100))) == ["a", "b"]
    assert [os.path.samefile(name, "a.jsonl") for name in source.input_files()] == [True, False]
    shutil.copy("a.jsonl", "copy.jsonl")
    assert texts(read(jsonl(Path("*.jsonl")), 100)) == ["a", "b", "a"], "a copy is another file"


def test_a_folder_in_place_of_files_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"names no file but a folder \('.*/\*' names its files\), seen from"):
        jsonl(tmp_path).parts(100)


@pytest.mark.parametrize(
    ("kind", "name", "named"),
    [
        ("text", "a.jsonl", "jsonl"),
        ("text", "a.jsonl.gz", "jsonl"),
        ("text", "A.NDJSON.ZST", "jsonl"),
        ("text", "a.parquet", "parquet"),
        ("text", "a.tar", "webdataset"),
        ("jsonl", "a.tgz", "webdataset"),
        ("jsonl", "a.tar.zst", "webdataset"),
        ("jsonl", "a.arrow", "datasets"),
        ("webdataset", "a.jsonl", "jsonl"),
        ("parquet", "a.jsonl", "jsonl"),
        ("text", "https://example.org/a.jsonl?token=x.txt", "jsonl"),
    ],
)
def test_a_file_of_another_kind_by_its_name_is_refused(tmp_path: Path, kind: str, name: str, named: str) -> None:
    """As text a file of JSON lines would be one document with all its braces and keys, and nobody would say so."""
    path = name if "://" in name else str(tmp_path / name)
    if "://" not in name:
        Path(path).write_bytes(b"x")
    source = build_settings(PrepareSettings, {"output": "x", "tokenizer": {"path": "t"}, "sources": {
        "s": {"kind": kind, "domain": "d", "files": [path]}}}, "t").sources["s"]  # fmt: skip
    shown = re.escape(path.partition("?")[0])
    told = rf"input '{shown}' .* a file for kind `{named}` by its name, .* kind is `{kind}`\. Set `kind: {named}`"
    with pytest.raises(UserError, match=told):
        source.parts(1)


@pytest.mark.parametrize(("kind", "name"), [
    ("text", "a.txt.gz"), ("text", "a"), ("text", "a.json"), ("jsonl", "a.json.gz"), ("jsonl", "a.txt"),
    ("jsonl", "pipe:cat a.tar"), ("webdataset", "shard-0"), ("text", "a.tar.md"),
])  # fmt: skip
def test_names_that_leave_the_kind_open(kind: str, name: str) -> None:
    assert kind_of_name(name) in (None, kind)


def test_doubts_about_the_input_are_told_and_stop_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = plain_settings(tmp_path, {"a": ("one", make_texts(30, 1))})
    for name in ("b", "c"):
        (tmp_path / f"{name}.jsonl").touch()
    (tmp_path / "list.json").write_text('{"text": "one"}\n')
    lines = {**plain["sources"]["a"], "files": [str(tmp_path / "*.jsonl")]}
    text = {"kind": "text", "domain": "two", "files": [str(tmp_path / "list.json")]}
    run(plain, sources={"lines": lines, "text": text}, heldout_fraction=0)
    said = capsys.readouterr().err
    assert f"warning: source 'lines': 2 of its files are empty (0 bytes; the first: {tmp_path}/b.jsonl).\n" in said
    assert f"warning: source 'text': 1 of its files are named as JSON (the first: {tmp_path}/list.json) and " in said
    assert said.count("warning") == 2
