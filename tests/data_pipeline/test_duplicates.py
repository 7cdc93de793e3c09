"""Duplicates between the passes, against plain comparisons of all pairs of a small corpus."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.cleaning.near_duplicates import NearDuplicatesSettings, Signer
from data_pipeline.prepare.checked_files import CheckedRows, piece_sums, publish_rows
from data_pipeline.prepare.duplicates import (
    EXACT,
    NEAR,
    Corpus,
    RunFiles,
    band_matches,
    choose,
    exact_duplicates,
    write_drops,
)
from data_pipeline.prepare.parts import content_id, is_heldout, shuffle_key
from data_pipeline.prepare.runs import ID_BYTES, RUN_DTYPE, read_drops

HELDOUT = 0.2
SETTINGS = NearDuplicatesSettings()
SIGNER = Signer(SETTINGS)


@dataclass(frozen=True)
class Item:
    source: int
    text: str
    url: str
    metadata: str = ""

    @property
    def id(self) -> bytes:
        return content_id(self.text.encode())

    @property
    def heldout(self) -> bool:
        return is_heldout(self.id, HELDOUT)

    @property
    def priority(self) -> tuple[bool, int, int, bytes, str, str]:
        return not self.heldout, self.source, shuffle_key(self.id, 7), self.id, self.url, self.metadata


def write_run(path: Path, items: list[Item]) -> tuple[RunFiles, list[Item]]:
    """The files of a run of one source, as the first pass leaves them."""
    rows = sorted(items, key=lambda item: (item.heldout, shuffle_key(item.id, 7), item.id, item.url, item.metadata))
    table = np.zeros(len(rows), RUN_DTYPE)
    table["key"] = [shuffle_key(item.id, 7) for item in rows]
    table["id"] = np.frombuffer(b"".join(item.id for item in rows), np.uint8).reshape(-1, ID_BYTES)
    for column, suffix in (("url", "urls"), ("metadata", "metadata")):
        texts = [getattr(item, column).encode() for item in rows]
        table[f"{column}_bytes"] = [len(text) for text in texts]
        table[f"{column}_start"] = np.cumsum(table[f"{column}_bytes"]) - table[f"{column}_bytes"]
        table[f"{column}_crc32c"] = piece_sums(texts)
        Path(f"{path}.{suffix}").write_bytes(b"".join(texts))
    signatures = np.stack([SIGNER.sign(item.text) for item in rows])
    publish_rows(Path(f"{path}.docs"), table)
    publish_rows(Path(f"{path}.minhash"), signatures)
    publish_rows(Path(f"{path}.bands"), SIGNER.bands(signatures).reshape(-1))
    train = sum(not item.heldout for item in rows)
    return RunFiles(str(path), rows[0].source, train, len(rows)), rows


def build(folder: Path, items: list[Item], cut: int) -> tuple[Corpus, list[Item]]:
    """Runs of at most ``cut`` documents in input order; the documents by number."""
    folder.mkdir()
    runs: list[RunFiles] = []
    numbered: list[Item] = []
    for source in sorted({item.source for item in items}):
        own = [item for item in items if item.source == source]
        for first in range(0, len(own), cut):
            run, rows = write_run(folder / f"{len(runs):03d}", own[first : first + cut])
            runs.append(run)
            numbered += rows
    return Corpus(runs, SETTINGS.permutations), numbered


def decide(
    folder: Path, items: list[Item], cut: int, range_documents: int, near: bool = True, exact: bool = True
) -> dict[str, tuple[int, str]]:
    """url of each dropped document -> (stage, url of the one that it repeats)."""
    corpus, numbered = build(folder, items, cut)
    equal = exact_duplicates(corpus, range_documents)[: None if exact else 0]
    bands = range(SETTINGS.bands if near else 0)
    matches = [band_matches(corpus, band, equal["document"], 0.8, range_documents) for band in bands]
    write_drops(corpus, equal, choose(corpus, np.concatenate([equal[:0], *matches])))
    found: dict[str, tuple[int, str]] = {}
    for run, offset in zip(corpus.runs, corpus.offsets.tolist(), strict=False):
        listed = read_drops(run.path)
        drops = listed.rows(0, len(listed))
        assert (np.diff(drops["row"].astype(np.int64)) > 0).all()
        for row, stage, kept in drops.tolist():
            found[numbered[offset + row].url] = (stage, numbered[kept].url)
    return found


def words(generator: np.random.Generator, count: int) -> list[str]:
    return [f"w{number}" for number in generator.integers(0, 5000, count)]


def shingles(text: str) -> set[tuple[str, ...]]:
    tokens = text.split()
    return {tuple(tokens[start : start + 5]) for start in range(len(tokens) - 4)}


def jaccard(left: str, right: str) -> float:
    one, other = shingles(left), shingles(right)
    return len(one & other) / len(one | other)


def test_exact_duplicates_against_a_plain_comparison(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    texts = [f"text {number}" for number in generator.integers(0, 60, 200)]
    items = [Item(int(generator.integers(0, 3)), text, f"u{place}") for place, text in enumerate(texts)]
    best = {text: min((i for i in items if i.text == text), key=lambda item: item.priority) for text in texts}
    expected = {item.url: (EXACT, best[item.text].url) for item in items if item is not best[item.text]}
    assert len(expected) > 100
    for name, cut, size in (("a", 1000, 1000), ("b", 7, 1000), ("c", 30, 11), ("d", 1, 3)):
        assert decide(tmp_path / name, items, cut, size, near=False) == expected


def family(generator: np.random.Generator, changes: int) -> tuple[str, str]:
    """Two texts of 400 words that differ in ``changes`` words far from each other."""
    left = words(generator, 400)
    right = list(left)
    for place in range(changes):
        right[10 + place * (380 // max(1, changes))] = f"x{generator.integers(0, 10**9)}"
    return " ".join(left), " ".join(right)


@pytest.fixture(scope="module")
def planted() -> tuple[list[Item], list[tuple[int, int]], list[tuple[int, int]]]:
    """Documents, the pairs of them that are 0.9 alike, and those that are 0.6 alike; all others share nothing."""
    generator = np.random.default_rng(1)
    texts: list[str] = []
    alike: list[tuple[int, int]] = []
    unlike: list[tuple[int, int]] = []
    for number in range(300):
        pairs, changes = (alike, 4) if number < 250 else (unlike, 18)
        pairs.append((len(texts), len(texts) + 1))
        texts += family(generator, changes)
    texts += [" ".join(words(generator, int(generator.integers(1, 300)))) for _ in range(150)]
    sources = generator.integers(0, 3, len(texts)).tolist()
    return [Item(*row) for row in zip(sources, texts, map("u{}".format, range(len(texts))), strict=True)], alike, unlike


def test_planted_near_duplicates_are_found_and_nothing_else(
    tmp_path: Path, planted: tuple[list[Item], list[tuple[int, int]], list[tuple[int, int]]]
) -> None:
    items, alike, unlike = planted
    for left, right in alike:
        assert 0.9 <= jaccard(items[left].text, items[right].text) <= 0.91
    for left, right in unlike:
        assert 0.55 <= jaccard(items[left].text, items[right].text) <= 0.65
    dropped = decide(tmp_path / "a", items, 1000, 10_000)
    expected = {}
    for left, right in alike:
        kept, gone = sorted((items[left], items[right]), key=lambda item: item.priority)
        expected[gone.url] = (NEAR, kept.url)
    assert dropped.items() <= expected.items()
    assert len(dropped) >= 0.99 * len(expected)
    assert decide(tmp_path / "b", items, 13, 10_000) == dropped
    assert decide(tmp_path / "c", items, 50, 37) == dropped


def test_a_heldout_document_is_never_dropped_for_a_training_one(
    tmp_path: Path, planted: tuple[list[Item], list[tuple[int, int]], list[tuple[int, int]]]
) -> None:
    items, alike, _ = planted
    mixed = [pair for pair in alike if items[pair[0]].heldout != items[pair[1]].heldout]
    assert len(mixed) > 30
    dropped = decide(tmp_path / "a", items, 100, 10_000)
    by_url = {item.url: item for item in items}
    assert sum(by_url[kept].heldout and not by_url[url].heldout for url, (_, kept) in dropped.items()) > 30
    assert not any(by_url[url].heldout and not by_url[kept].heldout for url, (_, kept) in dropped.items())


def test_of_a_large_group_one_stays_and_chance_matches_stay_apart(tmp_path: Path) -> None:
    """40 variants of one text, 40 of another: two components, whatever the cut; equal texts go as exact ones first."""
    generator = np.random.default_rng(2)
    items: list[Item] = []
    for group in range(2):
        base = words(generator, 600)
        for variant in range(40):
            text = " ".join([*base, f"end{variant % 30}"])
            items.append(Item(variant % 3, text, f"{group}-{variant}"))
    dropped = decide(tmp_path / "a", items, 1000, 1000)
    for group in ("0", "1"):
        own = [item for item in items if item.url.startswith(group)]
        best = min(own, key=lambda item: item.priority)
        assert {item.url for item in own} - dropped.keys() == {best.url}
        stages = [dropped[item.url][0] for item in own if item is not best]
        assert (stages.count(EXACT), stages.count(NEAR)) == (10, 29)
    assert decide(tmp_path / "b", items, 9, 5) == dropped
    only_near = decide(tmp_path / "c", items, 9, 5, exact=False)
    assert only_near.keys() == dropped.keys()
    assert {stage for stage, _ in only_near.values()} == {NEAR}


def test_members_unlike_the_first_of_their_group_are_compared_with_each_other(tmp_path: Path) -> None:
    """A band that all documents share: every similar pair must be found in it alone."""
    generator = np.random.default_rng(3)
    items = [
        Item(0, text, f"{n}{side}") for n in range(20) for side, text in zip("ab", family(generator, 2), strict=True)
    ]
    corpus, numbered = build(tmp_path / "a", items, 7)
    for run in corpus.runs:
        bands = CheckedRows(f"{run.path}.bands", np.uint64)
        hashes = np.array(bands.rows(0, len(bands)))
        hashes[: run.documents] = 5
        publish_rows(Path(f"{run.path}.bands"), hashes)
    matches = band_matches(corpus, 0, np.zeros(0, np.int64), 0.8, 1000)
    pairs = {frozenset((numbered[left].url, numbered[right].url)) for left, right in matches.tolist()}
    assert pairs == {frozenset((f"{n}a", f"{n}b")) for n in range(20)}


def test_nothing_to_drop(tmp_path: Path) -> None:
    items = [Item(0, f"unlike {number} {number * 7}", f"u{number}") for number in range(5)]
    assert decide(tmp_path / "a", items, 2, 100) == {}
