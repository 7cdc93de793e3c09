"""MinHash signatures and their bands: what near-duplicate removal needs of each document.

The Jaccard similarity J of two documents is that of their sets of n-grams (Broder 1997). A signature holds, for each of
``permutations`` keyed permutations, the least hash of the set; two signatures agree at a position with probability J.
Documents that agree in all rows of one of ``bands`` bands are compared: with r = permutations / bands rows that happens
with probability 1 - (1 - J^r)^bands (Leskovec et al., "Mining of Massive Datasets", 3.4.2). They are duplicates if
their signatures agree in at least ``threshold`` of all positions, an estimate of J whose standard deviation is
sqrt(J (1 - J) / permutations). With the defaults a pair is found with probability 0.9995 at J = 0.9, 0.93 at 0.85, 0.50
at 0.8 (where the estimate falls on either side), 0.09 at 0.75 and 0.005 at 0.7.

The permutations are those of the library `datasketch` ("affine32" scheme); n-grams are hashed by :mod:`.ngrams`.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from ..settings import Settings
from .ngrams import Hashes, Unit, hash_text, hash_units, mix, ngram_hashes, split_units

Signature = npt.NDArray[np.uint32]

_BATCH_NGRAMS = 8192


class NearDuplicatesSettings(Settings):
    """When two documents are too alike for both to stay."""

    unit: Unit = Field(
        default="words", description="What n-grams are made of; `characters` for languages written without blanks."
    )
    ngram: int = Field(
        default=5, ge=1, description="n, in units (5 words: Lee et al. 2022, arXiv 2107.06499; FineWeb)."
    )
    threshold: float = Field(
        default=0.8, gt=0, le=1, description="Estimated Jaccard similarity from which on two documents are duplicates "
        "(0.8: Lee et al. 2022, appendix A)."
    )  # fmt: skip
    permutations: int = Field(
        default=128, ge=1, le=4096, description="Positions of a signature, 4 bytes each (128: datasketch's default)."
    )
    bands: int = Field(
        default=16, ge=1, description="Bands of a signature, each of permutations / bands rows; more find more pairs."
    )
    seed: int = Field(default=1, ge=0, lt=1 << 32, description="Of the permutations (1: datasketch's default).")

    @model_validator(mode="after")
    def _even_bands(self) -> NearDuplicatesSettings:
        if self.permutations % self.bands:
            raise ValueError(f"bands {self.bands} does not divide permutations {self.permutations}")
        return self


class Signer:
    """Makes signatures. Equal settings give equal signatures everywhere."""

    def __init__(self, settings: NearDuplicatesSettings) -> None:
        self._settings = settings
        self.permutations = settings.permutations
        # here, for it brings SciPy along, which nobody else waits for
        from datasketch import MinHash

        self._new = partial(MinHash, settings.permutations, settings.seed, scheme="affine32")
        self._permutations = self._new().permutations

    def sign(self, text: str) -> Signature:
        """[permutations] the signature of ``text``; a text of fewer than n units is one n-gram, itself. One without any
        (signs and blanks alone) is like no text but the very same."""
        settings = self._settings
        units = hash_units(split_units(text, settings.unit))
        if len(units) == 0:
            units = np.array([hash_text(text)], np.uint64)
        grams = ngram_hashes(units, min(settings.ngram, len(units)))
        distinct = np.unique((grams >> np.uint64(32)).astype(np.uint32))
        sketch = self._new(hashfunc=int, permutations=self._permutations)
        for first in range(0, len(distinct), _BATCH_NGRAMS):
            sketch.update_batch(distinct[first : first + _BATCH_NGRAMS].tolist())
        return cast(Signature, sketch.hashvalues)

    def bands(self, signatures: Signature) -> Hashes:
        """[bands, documents] a 64-bit hash of each band of ``signatures`` [documents, permutations]."""
        rows = self._settings.permutations // self._settings.bands
        bands = np.zeros((self._settings.bands, len(signatures)), np.uint64)
        for band in range(self._settings.bands):
            for row in range(band * rows, (band + 1) * rows):
                bands[band] = mix(bands[band] * np.uint64(0x9E3779B97F4A7C15) + signatures[:, row])
        return bands


def agreement(left: Signature, right: Signature) -> npt.NDArray[np.float64]:
    """[pairs] the fraction of positions in which rows of ``left`` and ``right`` [pairs, permutations] are equal."""
    fraction: npt.NDArray[np.float64] = np.count_nonzero(left == right, axis=1) / left.shape[1]
    return fraction


def connected_components(
    first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], count: int
) -> npt.NDArray[np.int64]:
    """[count] the least member of each node's component, for the edges ``first[i]`` - ``second[i]``.

    Union-find without a loop over the edges: roots are hooked to the least root of their neighbours and paths halved
    until nothing changes, in O(log count) rounds of O(edges + count) each for any but adversarial graphs.
    """
    parent = np.arange(count)
    while True:
        left, right = parent[first], parent[second]
        if np.array_equal(left, right):
            return parent
        low, high = np.minimum(left, right), np.maximum(left, right)
        np.minimum.at(parent, high, low)
        while not np.array_equal(parent, shorter := parent[parent]):
            parent = shorter
