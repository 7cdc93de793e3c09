"""One text as the rules of cleaning see it, and what a rule says about it. Each view is computed at most once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Finding:
    """Why a rule rejects a text: ``reason`` is counted (few values), ``detail`` is for a reader of that one text."""

    reason: str
    detail: str


class TextView:
    """A text with its words and lines."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        """Runs of characters that are no white space (Unicode's), in order: punctuation stays with its word."""
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank, without white space at their ends."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]
