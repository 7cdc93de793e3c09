from __future__ import annotations

import subprocess
import sys
import unicodedata
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.cleaning.near_duplicates import (
    NearDuplicatesSettings,
    Signer,
    agreement,
    connected_components,
)
from data_pipeline.cleaning.ngrams import split_units
from data_pipeline.errors import UserError
from data_pipeline.settings import build_settings


def numbered(numbers: range | list[int]) -> str:
    return " ".join(f"w{number}" for number in numbers)


@pytest.mark.parametrize("jaccard", [0.0, 0.25, 0.5, 0.8, 0.9, 1.0])
def test_the_estimate_is_unbiased(jaccard: float) -> None:
    """n = 1: the similarity of two sets of words, known in closed form; the mean over 40 seeds within 4 deviations."""
    common = round(600 * jaccard)
    rest = (600 - common) // 2
    left = numbered(range(common + rest))
    right = numbered([*range(common), *range(5000, 5000 + rest)])
    estimates = []
    for seed in range(40):
        signer = Signer(NearDuplicatesSettings(ngram=1, seed=seed))
        estimates.append(agreement(signer.sign(left)[None], signer.sign(right)[None])[0])
    deviation = np.sqrt(jaccard * (1 - jaccard) / (128 * 40))
    assert abs(np.mean(estimates) - jaccard) <= 4 * deviation


def test_the_measured_chance_of_a_band_is_the_formula() -> None:
    """1 - (1 - J^r)^b for J = 0.75, r = 8, b = 16 over 300 seeds."""
    left, right = numbered(range(700)), numbered(range(100, 800))
    expected = 1 - (1 - 0.75**8) ** 16
    met = []
    for seed in range(300):
        signer = Signer(NearDuplicatesSettings(ngram=1, seed=seed))
        bands = signer.bands(np.stack([signer.sign(left), signer.sign(right)]))
        assert bands.shape == (16, 2)
        met.append(bool((bands[:, 0] == bands[:, 1]).any()))
    assert abs(np.mean(met) - expected) <= 4 * np.sqrt(expected * (1 - expected) / 300)


@pytest.mark.parametrize(("jaccard", "found"), [(0.9, 0.9995), (0.85, 0.93), (0.8, 0.50), (0.75, 0.09), (0.7, 0.005)])
def test_the_probabilities_of_the_docstring(jaccard: float, found: float) -> None:
    """Positions of a signature agree independently with probability J: 16 bands of 8, and 0.8 of all."""
    settings = NearDuplicatesSettings()
    shape = (100_000, settings.bands, settings.permutations // settings.bands)
    agree = np.random.default_rng(0).random(shape, np.float32) < jaccard
    both = agree.all(2).any(1) & (agree.mean((1, 2)) >= settings.threshold)
    assert both.mean() == pytest.approx(found, abs=0.006 if 0.01 < found < 0.99 else 0.0005)


def test_a_band_is_equal_when_its_rows_are() -> None:
    signer = Signer(NearDuplicatesSettings(permutations=12, bands=3))
    signatures = np.arange(24, dtype=np.uint32).reshape(2, 12)
    signatures[1, 4:8] = signatures[0, 4:8]
    bands = signer.bands(signatures)
    assert (bands[:, 0] == bands[:, 1]).tolist() == [False, True, False]


def test_shingles_hang_on_the_order_of_words_and_on_nothing_else() -> None:
    signer = Signer(NearDuplicatesSettings())
    text = numbered(range(50))
    assert np.array_equal(signer.sign(text), signer.sign(text.upper().replace(" ", ",  ")))
    shuffled = np.random.default_rng(0).permutation(50).tolist()
    assert agreement(signer.sign(text)[None], signer.sign(numbered(shuffled))[None])[0] < 0.1
    assert not np.array_equal(signer.sign("two words"), signer.sign("other words"))
    assert not np.array_equal(signer.sign("a"), signer.sign(""))
    characters = Signer(NearDuplicatesSettings(unit="characters", ngram=3))
    assert agreement(characters.sign("abcdefghij" * 3)[None], characters.sign("abcdefghij" * 9)[None])[0] == 1


@pytest.mark.parametrize("unit", ["words", "characters"])
def test_texts_without_any_word_are_like_nothing_but_themselves(unit: Literal["words", "characters"]) -> None:
    """Else all that is signs and blanks would be one document, and the rest of it dropped."""
    signer = Signer(NearDuplicatesSettings(unit=unit))
    texts = ["!!! ???", "{}();", " \n\t ", "\U0001f600\U0001f600", "\u2014", "!!! ??? "]
    for number, text in enumerate(texts):
        same = [bool((signer.sign(text) == signer.sign(other)).all()) for other in texts]
        assert same == [number == other for other in range(len(texts))]


def test_words_are_whole_in_every_script() -> None:
    """Vowel signs and other marks are no letters to `re`. Against a plain walk over Unicode's categories."""

    def plain(text: str) -> list[str]:
        joined = "".join(c if c == "_" or unicodedata.category(c)[0] in "LMN" else " " for c in text.casefold())
        return joined.split()

    texts = [
        "\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e",  # Devanagari
        "\u0bae\u0bca\u0bb4\u0bbf, \u0ba4\u0bae\u0bbf\u0bb4\u0bcd",  # Tamil
        "\U0001110c\U0001110b\U00011134\U0001111f\U00011133\U00011126 \U0001111e\U0001110c\U00011134",  # Chakma
        "\u845b\U000e0100\u98fe, \u845b\U000e0101",  # ideographs with variation selectors
        "\u0627\u0644\u0652\u062d\u064e\u0645\u0652\u062f\u064f (\u05d0\u05b8\u05d1)",  # Arabic, Hebrew
        "caf\u00e9 na\u00efve \U0001f600 end_1",
    ]
    for text in texts:
        assert split_units(text, "words") == plain(unicodedata.normalize("NFKC", text)), text
        assert split_units(text, "characters") == list(" ".join(split_units(text, "words")))


def test_a_long_text_is_signed_in_batches() -> None:
    """The least hash over all n-grams is the least over any division of them."""
    signer = Signer(NearDuplicatesSettings(ngram=1))
    whole = signer.sign(numbered(range(20_000)))
    pieces = [signer.sign(numbered(range(first, first + 5000))) for first in range(0, 20_000, 5000)]
    assert np.array_equal(whole, np.min(pieces, axis=0))


def test_signatures_are_equal_in_every_process() -> None:
    program = (
        "from data_pipeline.cleaning.near_duplicates import *\n"
        "print(Signer(NearDuplicatesSettings()).sign('one two three four five six').tolist())"
    )
    here = Signer(NearDuplicatesSettings()).sign("one two three four five six").tolist()
    for seed in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        assert there.stdout.strip() == str(here)
    assert here[:3] == GOLDEN


GOLDEN = [34596601, 921265442, 178589304]
"""Pinned: a data set that was begun with one version must be continued by another to the same bytes."""


def test_bands_must_divide_permutations() -> None:
    with pytest.raises(UserError, match="bands 5 does not divide permutations 128"):
        build_settings(NearDuplicatesSettings, {"bands": 5}, "test")


@given(st.integers(1, 30), st.data())
def test_components_against_a_plain_search(count: int, data: st.DataObject) -> None:
    nodes = st.integers(0, count - 1)
    edges = data.draw(st.lists(st.tuples(nodes, nodes), max_size=40))
    neighbours: dict[int, set[int]] = {node: {node} for node in range(count)}
    for left, right in edges:
        neighbours[left].add(right)
        neighbours[right].add(left)
    expected = []
    for node in range(count):
        seen, waiting = {node}, [node]
        while waiting:
            fresh = neighbours[waiting.pop()] - seen
            seen |= fresh
            waiting += fresh
        expected.append(min(seen))
    left, right = np.array(edges, np.int64).reshape(-1, 2).T
    assert connected_components(left, right, count).tolist() == expected


def test_a_long_chain_is_one_component() -> None:
    order = np.random.default_rng(0).permutation(100_000)
    assert not connected_components(order[:-1], order[1:], 100_000).any()
