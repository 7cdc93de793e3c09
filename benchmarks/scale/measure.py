"""Runs the probes, each in a fresh process, several times where it is short."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from .synthetic import make_synthetic

_BENCHMARKS = Path(__file__).resolve().parent.parent
MODES = ("full", "windowed")


def measure_scale(folder: Path, shards: int, batches: int, repetitions: int) -> dict[str, Any]:
    """Cold start (medians over fresh processes), cost of the order, resuming far in, memory over many batches."""
    dataset = make_synthetic(folder / f"synthetic-{shards}", shards)
    starts = []
    for mode in MODES:
        for ranks in (1, 128):
            runs = [_probe("first_batch", dataset, mode, ranks) for _ in range(repetitions)]
            starts.append({key: _median([run[key] for run in runs]) for key in runs[0]})
    return {
        "first_batch": starts,
        "order": [_probe("order", dataset, mode) for mode in MODES],
        "resume": [_probe("resume", dataset, mode) for mode in MODES],
        "memory": _probe("million", folder / "small", batches),
    }


def _median(values: list[Any]) -> Any:
    return statistics.median(values) if isinstance(values[0], float) else values[0]


def _probe(name: str, *arguments: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "scale.probe", name, *map(str, arguments)]
    done = subprocess.run(command, cwd=_BENCHMARKS, check=True, stdout=subprocess.PIPE)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
