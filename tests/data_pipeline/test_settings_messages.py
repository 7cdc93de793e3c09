"""What the settings say about a wrong shape: plain words, and keys as the file spells them."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from data_pipeline.prepare import PrepareSettings
from data_pipeline.settings import build_settings, load_settings

KINDS = "datasets, jsonl, parquet, stdlib, text, webdataset"
BASE = {
    "output": "out",
    "tokenizer": {"path": "tokenizer.model"},
    "sources": {"a": {"kind": "jsonl", "domain": "web", "files": ["a.jsonl"]}},
}


def refusal(**changed: object) -> str:
    with pytest.raises(UserError) as caught:
        build_settings(PrepareSettings, {**BASE, **changed}, "here")
    return str(caught.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sources": {"a": {"domain": "web"}}}, f"'sources.a' has no kind; known: {KINDS}"),
        ({"sources": {"a": {"kind": "json"}}}, "unknown kind 'json' of 'sources.a'; did you mean 'jsonl'?"),
        ({"sources": {"a": {"kind": "zzz"}}}, f"unknown kind 'zzz' of 'sources.a'; known here: {KINDS}"),
        ({"sources": {"a": {"kind": 3}}}, f"unknown kind 3 of 'sources.a'; known here: {KINDS}"),
        (
            {"sources": {"a": "a.jsonl"}},
            "'sources.a' = 'a.jsonl': expected a mapping of settings, for example a: {kind: datasets, ...}",
        ),
        (
            {"sources": ["a.jsonl"]},
            "'sources' = ['a.jsonl']: expected a mapping of settings, for example sources: {NAME: {kind: datasets, "
            "...}}",
        ),
        (
            {"cleaning": {"quality": True}},
            "'cleaning.quality' = True: expected a mapping of settings, for example quality: {}",
        ),
        ({"cleaning": ["c4"]}, "'cleaning' = ['c4']: expected a mapping of settings, for example cleaning: {}"),
        (
            {"sources": {"a": {"kind": "jsonl", "domain": "web", "files": "a: b.jsonl"}}},
            "'sources.a.files' = 'a: b.jsonl': expected a list, for example files: ['a: b.jsonl']",
        ),
        (
            {"tokenizer": {"train": 32000}},
            "'tokenizer.train' = 32000: expected a mapping of settings, for example train: {vocab_size: ...}",
        ),
    ],
)
def test_a_wrong_shape_is_told_in_plain_words(changed: dict[str, object], message: str) -> None:
    assert refusal(**changed) == f"here: {message}"


@pytest.mark.parametrize("name", ["a", "jsonl", "kind", "domain", "3"])
def test_keys_stand_as_the_file_spells_them(name: str) -> None:
    """pydantic puts the kind between a source's name and its key; a source may be named like a kind or a setting."""
    source = {"kind": "jsonl", "domian": "web", "files": 5}
    assert refusal(sources={name: source}) == (
        f"here: 'sources.{name}.domain' is missing and has no default; 'sources.{name}.files' = 5: expected a list, "
        f"for example files: [5]; unknown key 'sources.{name}.domian' (value 'web'); did you mean 'domain'?"
    )


def test_the_whole_may_have_a_wrong_shape() -> None:
    with pytest.raises(UserError) as caught:
        build_settings(PrepareSettings, 5, "here")
    assert str(caught.value) == "here: the configuration = 5: expected a mapping of settings"


def test_a_file_gets_the_same_words(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    path.write_text("output: out\ntokenizer: {path: t.model}\nsources:\n  a: {kind: json}\n")
    with pytest.raises(UserError) as caught:
        load_settings(PrepareSettings, path, ["cleaning.quality=true"])
    assert str(caught.value) == (
        f"{path}: unknown kind 'json' of 'sources.a'; did you mean 'jsonl'?; 'cleaning.quality' = True: expected a "
        "mapping of settings, for example quality: {}"
    )
