"""Every rule at its published threshold, which passes, and just beyond it, which does not."""

from __future__ import annotations

from typing import Any

import pytest

from data_pipeline.cleaning.c4 import C4Filter, C4Settings
from data_pipeline.cleaning.quality import QualityFilter, QualitySettings
from data_pipeline.cleaning.view import TextView
from data_pipeline.errors import UserError
from data_pipeline.settings import build_settings


def quality(text: str, **settings: Any) -> tuple[str, str] | None:
    finding = QualityFilter(build_settings(QualitySettings, settings, "test"))(TextView(text))
    return (finding.reason, finding.detail) if finding else None


def c4(text: str, **settings: Any) -> tuple[str, str] | None:
    finding = C4Filter(build_settings(C4Settings, settings, "test"))(TextView(text))
    return (finding.reason, finding.detail) if finding else None


def test_the_defaults_are_the_papers() -> None:
    settings = QualitySettings()
    assert (settings.min_words, settings.max_words) == (50, 100_000)
    assert (settings.min_mean_word_length, settings.max_mean_word_length) == (3, 10)
    assert (settings.max_symbol_ratio, settings.max_bullet_lines, settings.max_ellipsis_lines) == (0.1, 0.9, 0.3)
    assert (settings.min_alphabetic_words, settings.stop_words, settings.min_stop_words) == (0.8, (), 2)
    assert C4Settings().min_sentences == 3


LINES = "word word word word word\n"

CASES = [
    ("word " * 50, "word " * 49, "min_words", "49 < 50", {}),
    ("word " * 100_000, "word " * 100_001, "max_words", "100001 > 100000", {}),
    ("abc " * 50, "abc " * 49 + "ab", "min_mean_word_length", "2.98 < 3.0", {}),
    ("abcdefghij " * 50, "abcdefghij " * 49 + "abcdefghijk", "max_mean_word_length", "10.02 > 10.0", {}),
    ("word " * 45 + "#word " * 5, "word " * 44 + "#word " * 6, "max_symbol_ratio", "0.12 > 0.1", {}),
    ("w... " * 5 + "word " * 45, "w... " * 3 + "word… " * 3 + "word " * 44, "max_symbol_ratio", "0.12 > 0.1", {}),
    (LINES + ("- " + LINES) * 9, LINES + ("  • " + LINES) * 10, "max_bullet_lines", "0.909091 > 0.9", {}),
    (LINES * 14 + "a word…\n" * 6, LINES * 12 + "a word...  \n" * 6, "max_ellipsis_lines", "0.333333 > 0.3", {}),
    ("word " * 40 + "1234 " * 10, "word " * 39 + "1234 " * 11, "min_alphabetic_words", "0.78 < 0.8", {}),
    ("слово " * 40 + "12ж4 " * 20, "слово " * 30 + "12_4 " * 20, "min_alphabetic_words", "0.6 < 0.8", {}),
    ("x" * 7, "x" * 6, "min_characters", "6 < 7", {"min_characters": 7, "min_words": None}),
    ("x" * 7, "x" * 8, "max_characters", "8 > 7", {"max_characters": 7, "min_words": None}),
    ("The word AND " * 20, "The word " * 30, "min_stop_words", "1 < 2", {"stop_words": ["the", "and", "of"]}),
]  # fmt: skip


@pytest.mark.parametrize(("passes", "fails", "reason", "detail", "settings"), CASES)
def test_each_quality_rule(passes: str, fails: str, reason: str, detail: str, settings: dict[str, Any]) -> None:
    assert quality(passes, **settings) is None
    assert quality(fails, **settings) == (reason, detail)
    without = {"stop_words": []} if reason == "min_stop_words" else {reason: None}
    assert quality(fails, **{**settings, **without}) is None


def test_a_rule_set_to_null_is_gone() -> None:
    nothing = dict.fromkeys(
        ["min_words", "max_words", "min_mean_word_length", "max_mean_word_length", "max_symbol_ratio",
         "max_bullet_lines", "max_ellipsis_lines", "min_alphabetic_words"]
    )  # fmt: skip
    for text in ("", "#", "...", "-", "1", "a" * 1000):
        assert quality(text, **nothing) is None


@pytest.mark.parametrize("text", [" ", "\n\n", "\t"])
def test_a_text_of_blanks_has_no_words(text: str) -> None:
    assert quality(text) == ("min_words", "0 < 50")
    assert quality(text, min_words=None) == ("min_mean_word_length", "0.0 < 3.0")


def test_impossible_limits_are_refused() -> None:
    with pytest.raises(UserError, match=r"min_words 5 is above max_words 4: no document could pass"):
        build_settings(QualitySettings, {"min_words": 5, "max_words": 4}, "test")
    with pytest.raises(UserError, match=r"min_stop_words 2 is more than there are stop_words"):
        build_settings(QualitySettings, {"stop_words": ["the", "the"]}, "test")


@pytest.mark.parametrize(
    ("passes", "fails", "reason", "detail", "settings"),
    [
        ("One. Two! Three?", "One. Two", "min_sentences", "1 < 3", {}),
        ('"One." (Two.) v1.2.3 is "three".', "One. 1.2.3 a.b two!", "min_sentences", "2 < 3", {}),
        ("一。二！三？", "一。二三", "min_sentences", "1 < 3", {}),
        ("ایک۔ دو۔ تین؟", "एक। दो", "min_sentences", "1 < 3", {}),
        ("A.\nB.\nC.", "A. B. C.", "min_lines", "1 < 3", {"min_lines": 3}),
        ("A. B. C. " + "x" * 1000, "A. B. C. " + "x" * 1001, "max_word_characters", "1001 > 1000", {}),
        ("Lorem. ipsum. dolor.", "A. B. C. Lorem IPSUM", "lorem_ipsum", "holds placeholder text", {}),
        ("A. B. C. }", "A. B. C. {", "curly_brackets", "at character 9", {"curly_brackets": True}),
    ],
)
def test_each_c4_rule(passes: str, fails: str, reason: str, detail: str, settings: dict[str, Any]) -> None:
    assert c4(passes, **settings) is None
    assert c4(fails, **settings) == (reason, detail)


def test_c4_rules_that_are_off() -> None:
    assert c4("{ lorem ipsum " + "x" * 2000, min_sentences=None, lorem_ipsum=False, max_word_characters=None) is None
