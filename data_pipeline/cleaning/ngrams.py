"""64-bit hashes of word or character n-grams: equal on every machine, process and version of Python.

Two different n-grams get the same hash with probability 2^-64; among 10^9 evaluation n-grams a text of 10^4 words
meets one by chance with probability 10^9 * 10^4 / 2^64 = 5e-7.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from hashlib import blake2b
from typing import Literal

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Unit = Literal["words", "characters"]

_CACHED_WORDS = 1 << 20
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C13)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def split_units(text: str, unit: Unit) -> list[str]:
    """The words of ``text``, or its characters, after a light normalisation.

    Compatibility form NFKC, case folded; a word is a run of letters, marks, digits and underscores, so punctuation
    divides words and is dropped (GPT-3, arXiv 2005.14165, appendix C: "a lowercase, whitespace delimited word with no
    punctuation"). Characters are those of the words with one blank between two of them.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    plain, beyond = _word_patterns()
    # a code point beyond 16 bits takes two units of UTF-16; a pattern that looks for their marks takes twice as long
    words = (beyond if len(text.encode("utf-16-le", "surrogatepass")) > 2 * len(text) else plain).findall(text)
    return words if unit == "words" else list(" ".join(words))


def join_units(units: list[str], unit: Unit) -> str:
    """The text that ``units`` stand for, for people to read."""
    return (" " if unit == "words" else "").join(units)


def hash_units(units: list[str]) -> Hashes:
    """[units] :func:`hash_text` of each."""
    return np.fromiter(map(_unit_hashes.__getitem__, units), np.uint64, len(units))


def hash_text(text: str) -> int:
    """The first 8 bytes of the text's BLAKE2b, little-endian."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def ngram_hashes(hashes: Hashes, n: int) -> Hashes:
    """[units - n + 1] a hash of every n neighbours of ``hashes`` [units]; empty if there are fewer than ``n``.

    A polynomial in the neighbours modulo 2^64: they are random 64-bit numbers, so the odd multiplier only has to keep
    their order (3 modulo 8: differences of its powers have few factors of two).
    """
    count = max(0, len(hashes) - n + 1)
    state = np.zeros(count, np.uint64)
    for offset in range(n):
        state *= _MULTIPLIER
        state += hashes[offset : offset + count]
    return mix(state)


def mix(values: Hashes) -> Hashes:
    """The finaliser of SplitMix64 (Steele et al. 2014): a bijection of 64-bit integers that spreads every bit."""
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    mixed: Hashes = values ^ (values >> np.uint64(31))
    return mixed


class _UnitHashes(dict[str, int]):
    """Words come again and again: their hashes are kept, up to a bound."""

    def __missing__(self, unit: str) -> int:
        if len(self) >= _CACHED_WORDS:
            self.clear()
        value = self[unit] = hash_text(unit)
        return value


_unit_hashes = _UnitHashes()


@cache
def _word_patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """``\\w`` and the combining marks that it lacks, without which words of many scripts fall into pieces: of texts
    whose code points have 16 bits, and of all."""
    codes = [*range(0x300, 0x20000), *range(0xE0100, 0xE01F0)]  # no other plane has marks
    marks = [code for code in codes if unicodedata.category(chr(code)).startswith("M")]
    inside = rf"\w{_ranges([code for code in marks if code < 0x10000])}"
    beyond = _ranges([code for code in marks if code >= 0x10000])
    return re.compile(f"[{inside}]+"), re.compile(f"[{inside}]+(?:[{beyond}]+[{inside}]*)*")


def _ranges(codes: list[int]) -> str:
    """Ascending code points as the inside of a character class."""
    runs: list[list[int]] = []
    for code in codes:
        if runs and runs[-1][1] == code - 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in runs)
