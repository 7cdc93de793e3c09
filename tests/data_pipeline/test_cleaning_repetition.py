from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.cleaning.repetition import RepetitionFilter, RepetitionSettings, repetition_fractions
from data_pipeline.cleaning.view import TextView
from data_pipeline.settings import build_settings


def fractions(text: str) -> dict[str, float]:
    return dict(repetition_fractions(TextView(text)))


def distinct(count: int, prefix: str = "") -> list[str]:
    """Words of 5 characters, all different."""
    return [f"{prefix}{number:0{5 - len(prefix)}d}" for number in range(count)]


def plain_fractions(text: str) -> dict[str, float]:
    """The n-gram rules as the module's docstring says them, word by word."""
    words = text.split()
    total = sum(map(len, words)) or 1
    found: dict[str, float] = {}
    for n in range(2, 11):
        places: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for start in range(len(words) - n + 1):
            places[tuple(words[start : start + n])].append(start)
        repeated = {gram: starts for gram, starts in places.items() if len(starts) > 1}
        if n <= 4:
            name, chosen = f"max_top_{n}gram", []
            if repeated:
                best = min(repeated, key=lambda g: (-len(repeated[g]), -sum(map(len, g)), repeated[g][0]))
                chosen = repeated[best]
        else:
            name, chosen = f"max_duplicate_{n}grams", [start for starts in repeated.values() for start in starts[1:]]
        covered = {start + offset for start in chosen for offset in range(n)}
        found[name] = sum(len(words[word]) for word in covered) / total
    return found


@given(st.lists(st.sampled_from(["a", "bb", "ccc", "d", "ee"]), max_size=60))
def test_ngrams_against_a_plain_count(words: list[str]) -> None:
    measured = fractions(" ".join(words))
    assert {name: value for name, value in measured.items() if "gram" in name} == plain_fractions(" ".join(words))


def test_lines_and_paragraphs_in_closed_form() -> None:
    measured = fractions("aaa\n bbbbb \naaa\n\n\naaa\nbbbbb\naaa\n \nx")
    assert measured["max_duplicate_lines"] == 4 / 7
    assert measured["max_duplicate_line_characters"] == (3 + 5 + 3 + 3) / (4 * 3 + 2 * 5 + 1)
    measured = fractions("aaa\nbb\n\naaa\nbb\n \t\n\nccc\n\naaa\nbb\n")
    assert measured["max_duplicate_paragraphs"] == 2 / 4
    assert measured["max_duplicate_paragraph_characters"] == 12 / 21
    assert fractions("")["max_duplicate_lines"] == 0
    assert fractions("aaa\n\nbbb")["max_duplicate_paragraphs"] == 0


def test_top_ngrams_in_closed_form() -> None:
    words = distinct(100)
    words[10:12] = words[50:52] = words[80:82] = ["ab", "cde"]
    total = 94 * 5 + 3 * 5
    assert fractions(" ".join(words))["max_top_2gram"] == 15 / total
    assert fractions(" ".join(words))["max_top_3gram"] == 0
    # among equals the one with the most characters
    words[20:22] = words[60:62] = words[90:92] = ["abcdef", "ghi"]
    assert fractions(" ".join(words))["max_top_2gram"] == 27 / (88 * 5 + 3 * 5 + 3 * 9)
    # words of overlapping occurrences count once
    assert fractions("x x x x")["max_top_2gram"] == 1
    # an n-gram that occurs once is no repetition
    assert fractions("just two")["max_top_2gram"] == 0


def test_duplicate_ngrams_in_closed_form() -> None:
    passage = distinct(7, "p")
    words = [*distinct(50, "a"), *passage, *distinct(29, "b"), *passage, *distinct(7, "c")]
    measured = fractions(" ".join(words))
    assert len(words) == 100
    assert [measured[f"max_duplicate_{n}grams"] for n in range(5, 11)] == [0.07, 0.07, 0.07, 0, 0, 0]
    assert measured["max_top_4gram"] == 8 / 100


DEFAULTS = {
    "max_duplicate_lines": 0.30, "max_duplicate_paragraphs": 0.30, "max_duplicate_line_characters": 0.20,
    "max_duplicate_paragraph_characters": 0.20, "max_top_2gram": 0.20, "max_top_3gram": 0.18, "max_top_4gram": 0.16,
    "max_duplicate_5grams": 0.15, "max_duplicate_6grams": 0.14, "max_duplicate_7grams": 0.13,
    "max_duplicate_8grams": 0.12, "max_duplicate_9grams": 0.11, "max_duplicate_10grams": 0.10,
}  # fmt: skip


def test_the_defaults_are_those_of_table_a1() -> None:
    assert RepetitionSettings().model_dump() == DEFAULTS


def text_with(name: str, repeats: int) -> str:
    """A text of 100 (n-grams: 10,000) words in which exactly ``repeats`` per cent (n-grams: of 10,000) are repeats."""
    if name == "max_duplicate_lines":
        return "\n".join(["same"] * (repeats + 1) + [f"line{n:0500d}" for n in range(99 - repeats)])
    if name == "max_duplicate_paragraphs":
        return "\n\n".join(["same"] * (repeats + 1) + [f"par{n:0500d}" for n in range(99 - repeats)])
    separator = "\n\n" if name == "max_duplicate_paragraph_characters" else "\n"
    if name.endswith("characters"):  # one repeat of `repeats` characters among 100
        return separator.join(["r" * repeats, "r" * repeats, "s" * (100 - 2 * repeats)])
    n = int("".join(filter(str.isdigit, name)))
    words = [f"{number:05d}" for number in range(10_000)]
    if "top" in name:
        for place in range(repeats // n):
            words[place * 3 * n : place * 3 * n + n] = distinct(n, "t")
        return " ".join(words)
    words[-repeats:] = words[:repeats]
    return " ".join(words)


@pytest.mark.parametrize("name", DEFAULTS)
def test_each_rule_at_and_beyond_its_threshold(name: str) -> None:
    limit = DEFAULTS[name]
    scale = 10_000 if "gram" in name else 100
    n = int("".join(filter(str.isdigit, name)) or 1) if "top" in name else 1
    at = round(limit * scale) // n * n
    only: dict[str, Any] = {**dict.fromkeys(DEFAULTS), name: limit}
    check = RepetitionFilter(build_settings(RepetitionSettings, only, "test"))
    assert fractions(text_with(name, at))[name] == pytest.approx(at / scale)
    assert check(TextView(text_with(name, at))) is None
    finding = check(TextView(text_with(name, at + n)))
    assert finding is not None
    assert finding.reason == name
    off = RepetitionFilter(build_settings(RepetitionSettings, dict.fromkeys(DEFAULTS), "test"))
    assert off(TextView(text_with(name, at + n))) is None
