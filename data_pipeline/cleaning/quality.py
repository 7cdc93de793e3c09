"""Quality rules of MassiveText (Rae et al. 2021, "Gopher", arXiv 2112.11446, appendix A.1.1, "Quality Filtering").

The thresholds published there are the defaults. The paper's one rule that hangs on a language, at least two of eight
English stop words, is off unless a word list is given. A word is a run of characters that are no white space; the
paper does not say how it cuts words. Languages written without blanks need ``max_words``, ``max_mean_word_length``
and the like set to null, and the lengths in characters instead, which are this project's addition.

A rule that names a maximum rejects what lies above it, a minimum what lies below it: the threshold itself passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from pydantic import Field, model_validator

from ..settings import Settings
from .view import Finding, TextView

BULLETS = ("•", "‣", "◦", "▪", "●", "–", "-", "*")
"""What a bullet line begins with; the paper names none."""

ELLIPSES = ("...", "…")


class QualitySettings(Settings):
    """Limits that a document must keep; null takes a rule away."""

    min_characters: int | None = Field(default=None, ge=0, description="Characters; off by default (no published one).")
    max_characters: int | None = Field(default=None, ge=1, description="Characters; off by default (no published one).")
    min_words: int | None = Field(default=50, ge=0, description="Words (Gopher A.1.1).")
    max_words: int | None = Field(default=100_000, ge=1, description="Words (Gopher A.1.1).")
    min_mean_word_length: float | None = Field(default=3, ge=0, description="Characters per word (Gopher A.1.1).")
    max_mean_word_length: float | None = Field(default=10, gt=0, description="Characters per word (Gopher A.1.1).")
    max_symbol_ratio: float | None = Field(
        default=0.1, ge=0, description="Hash signs per word, and ellipses (... or …) per word (Gopher A.1.1)."
    )
    max_bullet_lines: float | None = Field(
        default=0.9, ge=0, le=1, description="Fraction of lines that begin with a bullet (Gopher A.1.1)."
    )
    max_ellipsis_lines: float | None = Field(
        default=0.3, ge=0, le=1, description="Fraction of lines that end with an ellipsis (Gopher A.1.1)."
    )
    min_alphabetic_words: float | None = Field(
        default=0.8, ge=0, le=1, description="Fraction of words with an alphabetic character (Gopher A.1.1)."
    )
    stop_words: tuple[str, ...] = Field(
        default=(),
        description="Words of the language, in lower case; empty: no such rule. Gopher's: the, be, to, of, and, that, "
        "have, with.",
    )
    min_stop_words: int = Field(
        default=2, ge=1, description="How many different ones of `stop_words` a document must hold (Gopher A.1.1)."
    )

    @model_validator(mode="after")
    def _reachable(self) -> QualitySettings:
        if self.stop_words and self.min_stop_words > len(set(self.stop_words)):
            raise ValueError(f"min_stop_words {self.min_stop_words} is more than there are stop_words")
        for least, most in (
            ("min_characters", "max_characters"),
            ("min_words", "max_words"),
            ("min_mean_word_length", "max_mean_word_length"),
        ):
            low, high = getattr(self, least), getattr(self, most)
            if low is not None and high is not None and low > high:
                raise ValueError(f"{least} {low} is above {most} {high}: no document could pass")
        return self


class QualityFilter:
    """Checks texts against :class:`QualitySettings`."""

    def __init__(self, settings: QualitySettings) -> None:
        self._settings = settings
        self._stop_words = frozenset(settings.stop_words)

    def __call__(self, view: TextView) -> Finding | None:
        """The first limit that the text breaks, in the order of the settings."""
        for name, value in self._measures(view):
            limit = getattr(self._settings, name)
            if limit is None:
                continue
            if value < limit if name.startswith("min_") else value > limit:
                sign = "<" if name.startswith("min_") else ">"
                return Finding(name, f"{value if isinstance(value, int) else round(value, 6)} {sign} {limit}")
        return None

    def _measures(self, view: TextView) -> Iterator[tuple[str, float]]:
        """(setting, measured value), cheap ones first; what is not asked for is not computed."""
        text, words = view.text, view.words
        yield "min_characters", len(text)
        yield "max_characters", len(text)
        yield "min_words", len(words)
        yield "max_words", len(words)
        counts = Counter(words)
        mean_length = _ratio(sum(len(word) * count for word, count in counts.items()), len(words))
        yield "min_mean_word_length", mean_length
        yield "max_mean_word_length", mean_length
        yield "max_symbol_ratio", _ratio(text.count("#"), len(words))
        yield "max_symbol_ratio", _ratio(sum(map(text.count, ELLIPSES)), len(words))
        lines = view.lines
        yield "max_bullet_lines", _ratio(sum(line.startswith(BULLETS) for line in lines), len(lines))
        yield "max_ellipsis_lines", _ratio(sum(line.endswith(ELLIPSES) for line in lines), len(lines))
        alphabetic = sum(count for word, count in counts.items() if word.isalpha() or any(map(str.isalpha, word)))
        yield "min_alphabetic_words", _ratio(alphabetic, len(words))
        if self._stop_words:
            yield "min_stop_words", len(self._stop_words.intersection(map(str.lower, counts)))


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
