"""Repetition rules of MassiveText (Rae et al. 2021, "Gopher", arXiv 2112.11446, appendix A.1.1 and table A1).

What the paper leaves open is fixed here. Lines are those that are not blank, paragraphs what blank lines divide; white
space at their ends does not count. The duplicates among lines and paragraphs are the repeats: all occurrences after
the first. Words are runs of characters that are no white space, and the characters of a fraction are those of words
(of lines, of paragraphs), without the white space between them.

* Top n-gram (n = 2, 3, 4): the n-gram that occurs most often, at least twice; among equals the one with the most
  characters. Its fraction is that of the words in any of its occurrences, each word counted once.
* Duplicate n-grams (n = 5 ... 10): the fraction of the words in n-grams that occurred before, each word counted once.

The n-grams are compared exactly, not by hashes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ..settings import Settings
from .view import Finding, TextView

_PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")

_Ints = npt.NDArray[np.int64]


def _limit(default: float, what: str) -> float | None:
    value: float | None = Field(default=default, ge=0, le=1, description=f"{what} (Gopher table A1).")
    return value


class RepetitionSettings(Settings):
    """The largest fractions that pass; null takes a rule away. The defaults are those of table A1."""

    max_duplicate_lines: float | None = _limit(0.30, "Fraction of lines that repeat one before")
    max_duplicate_paragraphs: float | None = _limit(0.30, "Fraction of paragraphs that repeat one before")
    max_duplicate_line_characters: float | None = _limit(0.20, "Fraction of characters in such lines")
    max_duplicate_paragraph_characters: float | None = _limit(0.20, "Fraction of characters in such paragraphs")
    max_top_2gram: float | None = _limit(0.20, "Fraction of characters in the most frequent 2-gram")
    max_top_3gram: float | None = _limit(0.18, "Fraction of characters in the most frequent 3-gram")
    max_top_4gram: float | None = _limit(0.16, "Fraction of characters in the most frequent 4-gram")
    max_duplicate_5grams: float | None = _limit(0.15, "Fraction of characters in repeated 5-grams")
    max_duplicate_6grams: float | None = _limit(0.14, "Fraction of characters in repeated 6-grams")
    max_duplicate_7grams: float | None = _limit(0.13, "Fraction of characters in repeated 7-grams")
    max_duplicate_8grams: float | None = _limit(0.12, "Fraction of characters in repeated 8-grams")
    max_duplicate_9grams: float | None = _limit(0.11, "Fraction of characters in repeated 9-grams")
    max_duplicate_10grams: float | None = _limit(0.10, "Fraction of characters in repeated 10-grams")


class RepetitionFilter:
    """Checks texts against :class:`RepetitionSettings`."""

    def __init__(self, settings: RepetitionSettings) -> None:
        self._limits = {name: limit for name, limit in settings.model_dump().items() if limit is not None}

    def __call__(self, view: TextView) -> Finding | None:
        """The first limit that the text breaks, in the order of the settings."""
        for name, value in repetition_fractions(view):
            if value > self._limits.get(name, 1.0):
                return Finding(name, f"{value:.6g} > {self._limits[name]:g}")
        return None


def repetition_fractions(view: TextView) -> Iterator[tuple[str, float]]:
    """(setting, measured fraction) for every rule, in the order of :class:`RepetitionSettings`, lazily."""
    lines = _repeats(view.lines)
    paragraphs = _repeats([part.strip() for part in _PARAGRAPH.split(view.text) if part.strip()])
    yield "max_duplicate_lines", lines[0]
    yield "max_duplicate_paragraphs", paragraphs[0]
    yield "max_duplicate_line_characters", lines[1]
    yield "max_duplicate_paragraph_characters", paragraphs[1]
    words = view.words
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
    sizes = np.fromiter(map(len, words), np.int64, len(words))
    total = max(1, int(sizes.sum()))
    for n, positions, grams in _repeated_ngrams(np.fromiter(map(numbers.__getitem__, words), np.int64, len(words))):
        if n <= 4:
            yield f"max_top_{n}gram", _covered(_most_frequent(positions, grams, n, sizes), n, sizes) / total
        else:
            yield f"max_duplicate_{n}grams", _covered(_after_first(positions, grams), n, sizes) / total


def _repeats(pieces: Sequence[str]) -> tuple[float, float]:
    """Fraction of pieces that repeat one before, and of the characters in them."""
    unique = dict.fromkeys(pieces)
    characters = sum(map(len, pieces))
    if len(unique) == len(pieces):
        return 0.0, 0.0
    return 1 - len(unique) / len(pieces), (characters - sum(map(len, unique))) / characters


def _repeated_ngrams(words: _Ints) -> Iterator[tuple[int, _Ints, _Ints]]:
    """For n = 2 ... 10: the positions of n-grams that occur more than once, ascending, and an id of each one's n-gram.

    An n-gram can only be repeated where its first n - 1 words are, so each n looks at what the last one left.
    """
    positions, grams = np.arange(len(words)), words
    for n in range(2, 11):
        fits = positions + n <= len(words)
        positions = positions[fits]
        pairs = grams[fits] * len(words) + words[positions + n - 1]
        _, grams, counts = np.unique(pairs, return_inverse=True, return_counts=True)
        repeated = counts[grams] > 1
        positions, grams = positions[repeated], grams[repeated]
        yield n, positions, grams


def _most_frequent(positions: _Ints, grams: _Ints, n: int, sizes: _Ints) -> _Ints:
    """The positions of the most frequent n-gram; of several, the one with the most characters, then the first."""
    if len(positions) == 0:
        return positions
    _, firsts, inverse, counts = np.unique(grams, return_index=True, return_inverse=True, return_counts=True)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    begins = positions[firsts]
    best = np.lexsort((begins, -(ends[begins + n] - ends[begins]), -counts))[0]
    return positions[inverse == best]


def _after_first(positions: _Ints, grams: _Ints) -> _Ints:
    """The positions whose n-gram occurred at an earlier one."""
    _, firsts = np.unique(grams, return_index=True)
    later: _Ints = np.delete(positions, firsts)
    return later


def _covered(positions: _Ints, n: int, sizes: _Ints) -> int:
    """Characters of the words in the n-grams at ``positions``, each word once."""
    covered = np.zeros(len(sizes), bool)
    for offset in range(n):
        covered[positions + offset] = True
    return int(sizes[covered].sum())
