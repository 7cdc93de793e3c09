"""Whole-document rules of C4 (Raffel et al. 2020, JMLR 21(140), section 2.2), those that hang on no language.

C4's rules about single lines (a terminal mark at the end of each, at least five words, no "javascript") rewrite pages
and its word list is English; they are left out.
"""

from __future__ import annotations

import re
from itertools import islice

from pydantic import Field

from ..settings import Settings
from .view import Finding, TextView

_SENTENCE_END = re.compile(r"""[.!?…؟۔।॥።។။]+["'”’»)\]]*(?=\s|\Z)|[。！？｡]+""")


class C4Settings(Settings):
    """Limits that a document must keep; null or false takes a rule away."""

    min_sentences: int | None = Field(
        default=3,
        ge=1,
        description="Sentences (C4, section 2.2): terminal marks of any script that end a word.",
    )
    min_lines: int | None = Field(default=None, ge=1, description="Lines that are not blank; off: not C4's.")
    max_word_characters: int | None = Field(
        default=1000, ge=1, description="Characters of the longest word (C4's code, _MAX_WORD_LENGTH; there per line)."
    )
    lorem_ipsum: bool = Field(default=True, description='Reject texts with "lorem ipsum" in any case (section 2.2).')
    curly_brackets: bool = Field(
        default=False, description="Reject texts with `{` (section 2.2). Off by default: it rejects most code."
    )


class C4Filter:
    """Checks texts against :class:`C4Settings`."""

    def __init__(self, settings: C4Settings) -> None:
        self._settings = settings

    def __call__(self, view: TextView) -> Finding | None:
        """The first rule that the text breaks."""
        settings, text = self._settings, view.text
        if settings.lorem_ipsum and "lorem ipsum" in text.lower():
            return Finding("lorem_ipsum", "holds placeholder text")
        if settings.curly_brackets and "{" in text:
            return Finding("curly_brackets", f"at character {text.index('{')}")
        if settings.min_lines is not None and len(view.lines) < settings.min_lines:
            return Finding("min_lines", f"{len(view.lines)} < {settings.min_lines}")
        if settings.max_word_characters is not None:
            longest = max(map(len, view.words), default=0)
            if longest > settings.max_word_characters:
                return Finding("max_word_characters", f"{longest} > {settings.max_word_characters}")
        if settings.min_sentences is not None:
            sentences = sum(1 for _ in islice(_SENTENCE_END.finditer(text), settings.min_sentences))
            if sentences < settings.min_sentences:
                return Finding("min_sentences", f"{sentences} < {settings.min_sentences}")
        return None
