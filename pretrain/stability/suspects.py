"""The samples of a step that may have done it, each with the command that shows its documents."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

NAMED = 8
"""Samples of a step that are named at most; the others are counted."""
DOCUMENTS = 3
"""Documents of a sample that are named at most."""


class Suspect(NamedTuple):
    """A sequence of a step. ``row`` is counted over the rank's micro-batches; ``loss`` is its mean, nats."""

    rank: int
    row: int
    position: int
    source: int
    loss: float


def suspicious(samples: Sequence[Suspect], kind: str) -> list[Suspect]:
    """Of all samples of a step: those without a finite loss where that is the matter, else the highest losses."""
    if kind == "non_finite":
        return sorted(sample for sample in samples if not math.isfinite(sample.loss))
    return sorted(samples, key=lambda sample: (-sample.loss, sample))[:NAMED]


def name_samples(
    samples: Sequence[Suspect],
    names: Sequence[str],
    documents: Mapping[int, Sequence[str]],
    run_folder: Path | None,
    step: int,
) -> str:
    """The samples in words.

    Args:
        names: of the sources.
        documents: ids of those that a position holds, as far as they are known.
        run_folder: None: no command can show the samples any more.
        step: theirs, from 1.
    """
    named = []
    for found in samples[:NAMED]:
        told = f"position {found.position} of source {names[found.source]!r}, loss {found.loss:.4g}"
        if ids := documents.get(found.position):
            more = f" and {len(ids) - DOCUMENTS} more" if len(ids) > DOCUMENTS else ""
            told += f", documents {', '.join(ids[:DOCUMENTS])}{more}"
        if run_folder is not None:
            seat = f"--step {step} --rank {found.rank} --row {found.row}"
            told += f" (`pretrain-data explain {shlex.quote(str(run_folder))} {seat}`)"
        named.append(told)
    return "; ".join(named) + (f" and {len(samples) - NAMED} more" if len(samples) > NAMED else "")
