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
from dataclasses import dataclass

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
    ends = np.concatenate([[0], np.cumsum(sizes)])
    for grams in _repeated_ngrams(np.fromiter(map(numbers.__getitem__, words), np.int64, len(words))):
        if grams.n <= 4:
            yield f"max_top_{grams.n}gram", grams.characters(grams.most_frequent(ends), sizes) / total
        else:
            yield f"max_duplicate_{grams.n}grams", grams.characters(grams.after_first(), sizes) / total


@dataclass(frozen=True)
class _Repeated:
    """The n-grams that occur more than once: each one's ``counts`` positions, ascending, one n-gram after another."""

    n: int
    positions: _Ints
    counts: _Ints

    def most_frequent(self, ends: _Ints) -> _Ints:
        """The positions of the most frequent one; of several, the one with the most characters, then the first.

        ``ends`` [words + 1]: characters of the words before each.
        """
        if len(self.counts) == 0:
            return self.positions
        starts = np.cumsum(self.counts) - self.counts
        ties = np.flatnonzero(self.counts == self.counts.max())
        first = self.positions[starts[ties]]
        best = ties[np.lexsort((first, ends[first] - ends[first + self.n]))[0]]
        return self.positions[starts[best] : starts[best] + self.counts[best]]

    def after_first(self) -> _Ints:
        """All positions but the first of each n-gram."""
        later = np.ones(len(self.positions), bool)
        later[np.cumsum(self.counts) - self.counts] = False
        return self.positions[later]

    def characters(self, positions: _Ints, sizes: _Ints) -> int:
        """Characters of the words in the n-grams at ``positions``, each word once; ``sizes`` [words] in characters."""
        if len(positions) == 0:
            return 0
        covered = np.zeros(len(sizes), bool)
        covered[positions[:, None] + np.arange(self.n)] = True
        return int(sizes[covered].sum())


def _repeated_ngrams(words: _Ints) -> Iterator[_Repeated]:
    """For n = 2 ... 10 the n-grams of ``words`` (numbers below their count) that occur more than once.

    An n-gram can only be repeated where its first n - 1 words are, so each n looks at what the last one left.
    """
    positions, grams = np.arange(len(words)), words
    for n in range(2, 11):
        if len(positions):
            fits = positions + n <= len(words)
            positions, grams = positions[fits], grams[fits]
            pairs = grams * len(words) + words[positions + n - 1]
            order = np.argsort(pairs, kind="stable")
            pairs = pairs[order]
            starts = np.flatnonzero(np.concatenate([[True] * (len(pairs) > 0), pairs[1:] != pairs[:-1]]))
            counts = np.diff(np.append(starts, len(pairs)))
            positions = positions[order][np.repeat(counts > 1, counts)]
            counts = counts[counts > 1]
            grams = np.repeat(np.arange(len(counts)), counts)
            found = _Repeated(n, positions, counts)
        else:
            found = _Repeated(n, positions, positions)
        yield found


def _repeats(pieces: Sequence[str]) -> tuple[float, float]:
    """Fraction of pieces that repeat one before, and of the characters in them."""
    unique = dict.fromkeys(pieces)
    characters = sum(map(len, pieces))
    if len(unique) == len(pieces):
        return 0.0, 0.0
    return (len(pieces) - len(unique)) / len(pieces), (characters - sum(map(len, unique))) / characters
