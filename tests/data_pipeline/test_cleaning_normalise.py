from __future__ import annotations

import itertools
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.cleaning.normalise import Normaliser, NormaliseSettings

SPECIAL = (
    "\r\n\t \x0b\x0c\x00\x1f\x7f\x85\u00a0\u00ad\u200b\u200d\u2028\u2029\u3000\ufeff\ufb01\u00e9\u0301e\u1100\u1161"
)
TEXTS = st.text(st.one_of(st.sampled_from(SPECIAL), st.characters(exclude_categories=["Cs"])), max_size=40)
ALL_SETTINGS = st.builds(
    NormaliseSettings,
    form=st.sampled_from(["NFC", "NFKC", "none"]),
    control=st.booleans(),
    line_ends=st.booleans(),
    spaces=st.booleans(),
    collapse_blanks=st.booleans(),
    trailing_blanks=st.booleans(),
    max_blank_lines=st.none() | st.integers(0, 3),
)


def off(**chosen: object) -> NormaliseSettings:
    """Only the chosen steps."""
    nothing = {"control": False, "line_ends": False, "spaces": False, "trailing_blanks": False}
    return NormaliseSettings.model_validate({"form": "none", "max_blank_lines": None, **nothing, **chosen})


@given(TEXTS, ALL_SETTINGS)
def test_twice_is_once(text: str, settings: NormaliseSettings) -> None:
    normalise = Normaliser(settings)
    once = normalise(text)
    assert normalise(once) == once


@given(TEXTS)
def test_every_step_off_changes_nothing(text: str) -> None:
    assert Normaliser(off())(text) == text


@pytest.mark.parametrize(
    ("settings", "text", "expected"),
    [
        (off(form="NFC"), "e\u0301 \ufb01", "\u00e9 \ufb01"),
        (off(form="NFKC"), "e\u0301 \ufb01\uff21", "\u00e9 fiA"),
        (off(control=True), "\ufeffa\x00b\u200bc\u00add\x7fe\tf\ng\r\nh\u200di\ufffd", "abcde\tf\ng\r\nh\u200di\ufffd"),
        (off(control=True), "plain\x01ascii", "plainascii"),
        (off(line_ends=True), "a\r\nb\rc\x0bd\x0ce\x85f\u2028g\u2029h\n\ri", "a\nb\nc\nd\ne\nf\ng\n\nh\n\ni"),
        (off(spaces=True), "a\u00a0b\u2009c\u3000d\te", "a b c d\te"),
        (off(collapse_blanks=True), "  indented   by \t two\t\tb\n\tc  d", "  indented by two b\n\tc d"),
        (off(trailing_blanks=True), "\n \na  \nb\t \n\n  c \n\n", "a\nb\n\n  c"),
        (off(max_blank_lines=1), "a\n\n\n\nb\n\nc\n \t\n\n d", "a\n\nb\n\nc\n\n d"),
        (off(max_blank_lines=0), "a\n\n\nb\nc", "a\nb\nc"),
        (NormaliseSettings(), "\ufeffA\u00a0line \r\n\r\n\r\n\r\n\r\nB\u0000e\u0301\r\n", "A line\n\n\nB\u00e9"),
    ],
)
def test_each_step(settings: NormaliseSettings, text: str, expected: str) -> None:
    assert Normaliser(settings)(text) == expected


def test_control_removes_what_unicode_calls_control_and_nothing_that_can_be_seen() -> None:
    """Against Unicode's own tables, over every character."""
    normalise = Normaliser(off(control=True))
    kept_controls = set("\t\n\r\x0b\x0c\x85")
    invisible = set("\u00ad\u180e\u200b\u2060\u2061\u2062\u2063\u2064\ufeff\ufff9\ufffa\ufffb")
    for code in itertools.chain(range(0xD800), range(0xE000, sys.maxunicode + 1)):
        character = chr(code)
        noncharacter = code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF
        control = unicodedata.category(character) == "Cc" and character not in kept_controls
        gone = control or noncharacter or character in invisible
        assert normalise(f"a{character}") == ("a" if gone else f"a{character}"), hex(code)


def test_spaces_are_those_of_unicode() -> None:
    normalise = Normaliser(off(spaces=True))
    for code in itertools.chain(range(0xD800), range(0xE000, 0x20000)):
        character = chr(code)
        assert (normalise(character) == " ") == (unicodedata.category(character) == "Zs"), hex(code)
