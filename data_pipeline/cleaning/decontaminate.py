"""Decontamination: reject documents that share n-grams with evaluation texts.

After GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix C), which compares 13-grams of lower-case words without
punctuation. Where GPT-3 cuts the match and 200 characters around it out of a document, the whole document goes here;
``min_overlap`` spares long documents that only quote a line. An evaluation text shorter than n is matched whole, if it
has ``min_units`` words at all: shorter ones ("yes", "in the end") would match half of any corpus.

Memory: 16 bytes a distinct n-gram of the evaluation texts and up to 64 MB, in every worker process.
"""

from __future__ import annotations

import glob
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ..errors import UserError
from ..files import sha256_file
from ..settings import Settings
from ..sources.unpacking import DAMAGE
from .ngrams import Hashes, Unit, hash_units, join_units, ngram_hashes, split_units
from .view import Finding, TextView

_LONGEST_FILTER_BITS = 26
_SHOWN_CHARACTERS = 200
_UTF8 = "utf-8-sig"


class DecontaminateSettings(Settings):
    """Which evaluation texts to keep out of the training text, and how alike is too alike."""

    files: tuple[str, ...] = Field(
        min_length=1,
        description="Evaluation texts, paths or globs: .jsonl (each of `fields` of each line is a text) or .txt "
        "(texts divided by blank lines), both also as .gz.",
    )
    fields: tuple[str, ...] = Field(default=("text",), min_length=1, description="Fields of .jsonl lines to take.")
    unit: Unit = Field(
        default="words", description="What n-grams are made of; `characters` for languages written without blanks."
    )
    ngram: int = Field(default=13, ge=1, description="n, in units (GPT-3, appendix C: 13 words).")
    min_units: int = Field(
        default=8, ge=1, description="Evaluation texts of fewer units are not looked for (GPT-3's smallest n: 8 words)."
    )
    min_overlap: float = Field(
        default=0,
        ge=0,
        le=1,
        description="Fraction of the distinct n-grams of one evaluation text that a document must hold to be rejected; "
        "0: a single one is enough (GPT-3).",
    )

    def input_files(self) -> list[str]:
        """The files that the patterns name, each once, sorted.

        Raises:
            UserError: a pattern matches no file.
        """
        found: set[str] = set()
        for pattern in self.files:
            matches = [path for path in glob.glob(pattern, recursive=True) if Path(path).is_file()]
            if not matches:
                raise UserError(f"decontaminate.files: {pattern!r} matches no file. Mend it, or take it out.")
            found.update(matches)
        return sorted(found)

    def stamp(self) -> dict[str, str]:
        """The SHA-256 of each evaluation file: another content is another data set."""
        return {path: sha256_file(Path(path)) for path in self.input_files()}


@dataclass(frozen=True)
class _Table:
    """N-grams of one length: their hashes, ascending, the text that each belongs to, and a filter before the search."""

    hashes: Hashes
    texts: npt.NDArray[np.int64]
    present: npt.NDArray[np.bool_]
    shift: np.uint64

    @classmethod
    def of(cls, grams: Sequence[Hashes], texts: Sequence[int]) -> _Table:
        hashes = np.concatenate(grams)
        owners = np.repeat(np.array(texts, np.int64), [len(gram) for gram in grams])
        order = np.lexsort((owners, hashes))
        bits = min(_LONGEST_FILTER_BITS, max(8, (16 * len(hashes)).bit_length()))
        shift = np.uint64(64 - bits)
        present = np.zeros(1 << bits, bool)
        present[hashes >> shift] = True
        return cls(hashes[order], owners[order], present, shift)

    def positions(self, hashes: Hashes) -> npt.NDArray[np.int64]:
        """Which of ``hashes`` are in the table."""
        likely = np.flatnonzero(self.present[hashes >> self.shift])
        place = np.searchsorted(self.hashes, hashes[likely])
        found: npt.NDArray[np.int64] = likely[self.hashes[np.minimum(place, len(self.hashes) - 1)] == hashes[likely]]
        return found

    def owners(self, hashes: Hashes) -> npt.NDArray[np.int64]:
        """The text of every row whose hash is one of ``hashes`` (ascending, distinct, all of them in the table)."""
        first = np.searchsorted(self.hashes, hashes, side="left")
        last = np.searchsorted(self.hashes, hashes, side="right")
        return np.concatenate([self.texts[begin:end] for begin, end in zip(first, last, strict=True)])

    def first_of(self, text: int, hashes: Hashes) -> int:
        """The first of ``hashes`` that belongs to evaluation text ``text``; one of them does."""
        return int(np.flatnonzero(np.isin(hashes, self.hashes[self.texts == text]))[0])


class Decontaminator:
    """Checks texts against the n-grams of all evaluation texts.

    Attributes:
        ignored: evaluation texts that are too short to be looked for.
    """

    def __init__(self, settings: DecontaminateSettings) -> None:
        self._settings = settings
        self._places: list[tuple[str, str]] = []
        self._totals: list[int] = []
        self.ignored = 0
        grams: dict[int, tuple[list[Hashes], list[int]]] = {}
        for path, place, text in _evaluation_texts(settings):
            units = hash_units(split_units(text, settings.unit))
            if len(units) < settings.min_units:
                self.ignored += 1
                continue
            n = min(len(units), settings.ngram)
            distinct = np.unique(ngram_hashes(units, n))
            hashes, texts = grams.setdefault(n, ([], []))
            hashes.append(distinct)
            texts.append(len(self._places))
            self._places.append((path, place))
            self._totals.append(len(distinct))
        if not grams:
            raise UserError(
                f"decontaminate: none of the {self.ignored} texts in {', '.join(settings.files)} has "
                f"{settings.min_units} {settings.unit}. Name other `files` or `fields`, or lower `min_units`."
            )
        self._tables = {n: _Table.of(*grams[n]) for n in sorted(grams)}

    def __call__(self, view: TextView) -> Finding | None:
        """The evaluation text that the document holds most of (of equals, the first), and the first n-gram of it."""
        units = split_units(view.text, self._settings.unit)
        hashes = hash_units(units)
        best: tuple[float, int, int] | None = None
        for n, table in self._tables.items():
            grams = ngram_hashes(hashes, n)
            found = np.unique(grams[table.positions(grams)])
            if len(found) == 0:
                continue
            owners, counts = np.unique(table.owners(found), return_counts=True)
            for text, count in zip(owners.tolist(), counts.tolist(), strict=True):
                best = min(best or (0.0, 0, 0), (-count / self._totals[text], text, n))
        if best is None or -best[0] < self._settings.min_overlap:
            return None
        fraction, text, n = best
        position = self._tables[n].first_of(text, ngram_hashes(hashes, n))
        path, place = self._places[text]
        shown = join_units(units[position : position + n], self._settings.unit)[:_SHOWN_CHARACTERS]
        return Finding(path, f"{-fraction:.4g} of the n-grams of {place}, first: {shown!r}")


def _evaluation_texts(settings: DecontaminateSettings) -> Iterator[tuple[str, str, str]]:
    """(file, place in it, text) of every evaluation text.

    Raises:
        UserError: a file is neither .jsonl nor .txt, is not UTF-8, or a line of it lacks a field.
    """
    for path in settings.input_files():
        kind = path.removesuffix(".gz")
        try:
            # UTF-8, but for a byte-order mark at the beginning, which is no text
            with gzip.open(path, "rt", encoding=_UTF8) if path != kind else open(path, encoding=_UTF8) as handle:
                if kind.endswith(".jsonl"):
                    for number, line in enumerate(handle, 1):
                        yield from _line_texts(path, number, line, settings.fields) if line.strip() else ()
                elif kind.endswith(".txt"):
                    for number, text in enumerate(handle.read().split("\n\n"), 1):
                        yield path, f"paragraph {number}", text
                else:
                    raise UserError(f"decontaminate.files: {path} is neither .jsonl nor .txt (nor one of them .gz).")
        except (UnicodeDecodeError, *DAMAGE) as error:
            raise UserError(f"decontaminate.files: {path} can't be read as UTF-8 text: {error}.") from error


def _line_texts(path: str, number: int, line: str, fields: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"decontaminate.files: line {number} of {path} is not valid JSON ({error}).") from error
    for field in fields:
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(
                f"decontaminate.files: line {number} of {path} has no text in field {field!r}. Mend it, or `fields`."
            )
        yield path, f"line {number}" if len(fields) == 1 else f"line {number} ({field})", text
