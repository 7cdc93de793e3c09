"""The passes between tokenising and writing shards, when duplicates are to go: jobs like those of the other passes.

1. ``exact``: one job over all runs (:func:`.duplicates.exact_duplicates`).
2. ``bands``: one job a band of the signatures, each over all runs (:func:`.duplicates.band_matches`).
3. ``choose``: one job that takes both together and writes the drop list of every run.

Each job publishes its result under ``.prepare/duplicates``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..cleaning import CleaningSettings
from ..manifest import HELDOUT, TRAIN
from .checked_files import CheckedRows, publish_record, publish_rows, read_record
from .duplicates import (
    EXACT,
    PAIR_DTYPE,
    Corpus,
    RunFiles,
    band_matches,
    choose,
    exact_duplicates,
    write_drops,
)
from .runs import read_drops

EXACT_STAGE, NEAR_STAGE = "exact_duplicates", "near_duplicates"


@dataclass(frozen=True)
class CompareJob:
    """One comparison over all runs; everything a worker process needs.

    Attributes:
        folder: where results go.
        runs: all runs, in order of their parts.
        sources: the names of the sources, in the configuration's order.
        stage: ``exact``, ``choose``, or the number of a band.
        cleaning: the settings.
    """

    folder: Path
    runs: tuple[RunFiles, ...]
    sources: tuple[str, ...]
    stage: str | int
    cleaning: CleaningSettings

    @property
    def record(self) -> Path:
        """Published when the job is done."""
        if self.stage == "choose":
            return self.folder / "duplicates.json"
        return self.folder / (f"band-{self.stage:04d}" if isinstance(self.stage, int) else "exact")

    @property
    def title(self) -> str:
        """The name of its pass."""
        return {"exact": "find equal text", "choose": "choose what stays"}.get(str(self.stage), "find similar text")

    @property
    def label(self) -> str:
        """For messages."""
        return f"duplicates {self.stage}"


def plan_comparisons(
    folder: Path, runs: Sequence[RunFiles], sources: Sequence[str], cleaning: CleaningSettings
) -> list[list[CompareJob]]:
    """The jobs of each pass, in order; the jobs of one pass need all of the passes before."""
    passes: list[list[str | int]] = []
    if cleaning.exact_duplicates:
        passes.append(["exact"])
    if cleaning.near_duplicates:
        passes.append(list(range(cleaning.near_duplicates.bands)))
    if passes:
        passes.append(["choose"])
    return [[CompareJob(folder, tuple(runs), tuple(sources), stage, cleaning) for stage in stages] for stages in passes]


def compare(job: CompareJob) -> None:
    """Do one comparison.

    Raises:
        DamagedFileError: what earlier passes have left is not as it was written.
    """
    near = job.cleaning.near_duplicates
    corpus = Corpus(job.runs, near.permutations if near else 0)
    if job.stage == "choose":
        publish_record(job.record, _choose(job, corpus))
        return
    if isinstance(job.stage, int):
        assert near is not None
        pairs = band_matches(corpus, job.stage, _exact(job)["document"], near.threshold)
    else:
        pairs = exact_duplicates(corpus)
    publish_rows(job.record, pairs)


def dropped_totals(folder: Path) -> dict[str, dict[str, Any]]:
    """What the drop lists leave out of each source, once the last job is done: by source, ``documents``,
    ``text_bytes``, ``tokens`` (train, heldout) and ``rejected`` (stage -> reason -> documents, text_bytes)."""
    totals: dict[str, dict[str, Any]] = read_record(folder / "duplicates.json")
    return totals


def stage_and_reason(stage: int, kept_heldout: bool) -> tuple[str, str]:
    """How a dropped row is counted: the stage's key in the configuration, and what it repeats."""
    return (EXACT_STAGE if stage == EXACT else NEAR_STAGE), f"repeats {HELDOUT if kept_heldout else TRAIN} text"


def _exact(job: CompareJob) -> np.ndarray[Any, np.dtype[np.void]]:
    return _pairs(job.folder / "exact") if job.cleaning.exact_duplicates else np.zeros(0, PAIR_DTYPE)


def _pairs(path: Path) -> np.ndarray[Any, np.dtype[np.void]]:
    pairs = CheckedRows(path, PAIR_DTYPE)
    return pairs.rows(0, len(pairs))


def _choose(job: CompareJob, corpus: Corpus) -> dict[str, dict[str, Any]]:
    near = job.cleaning.near_duplicates
    bands = [_pairs(job.folder / f"band-{band:04d}") for band in range(near.bands if near else 0)]
    write_drops(corpus, _exact(job), choose(corpus, np.concatenate([np.zeros(0, PAIR_DTYPE), *bands])))
    totals: dict[str, dict[str, Any]] = {
        source: {"documents": 0, "text_bytes": 0, "tokens": {TRAIN: 0, HELDOUT: 0}, "rejected": {}}
        for source in job.sources
    }
    for run in job.runs:
        listed = read_drops(run.path)
        drops = listed.rows(0, len(listed))
        rows = run.table().take(drops["row"].astype(np.int64))
        own = totals[job.sources[run.source]]
        own["documents"] += len(drops)
        own["text_bytes"] += int(rows["text_bytes"].sum())
        train = drops["row"] < run.train
        own["tokens"][TRAIN] += int(rows["length"][train].sum())
        own["tokens"][HELDOUT] += int(rows["length"][~train].sum())
        heldout = corpus.heldout(drops["kept"])
        for stage in np.unique(drops["stage"]).tolist():
            for side in (False, True):
                chosen = (drops["stage"] == stage) & (heldout == side)
                if chosen.any():
                    name, reason = stage_and_reason(stage, side)
                    counts = own["rejected"].setdefault(name, {}).setdefault(reason, {"documents": 0, "text_bytes": 0})
                    counts["documents"] += int(chosen.sum())
                    counts["text_bytes"] += int(rows["text_bytes"][chosen].sum())
    return totals
