"""A tiny run on a data set of a test, for what looks at runs without starting them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launch.preflight import Finding, Request, preflight
from tests.system.runs import Runs


def request(runs: Runs, name: str = "run", *overrides: str, **options: Any) -> Request:
    """The tiny run on one node without GPUs."""
    path = runs.folder / f"{name}.yaml"
    return Request(path if path.exists() else runs.config(name), overrides, **{"gpus": False, **options})


def codes(found: list[Finding], *severities: str) -> list[str]:
    return [finding.code for finding in found if finding.severity in (severities or ("error", "warning"))]


def check(runs: Runs, *overrides: str, **options: Any) -> list[Finding]:
    return preflight(request(runs, "run", *overrides, **options))


def write_steps(folder: Path, steps: int, seconds: float = 0.5) -> None:
    """The metrics of a run that has done some steps."""
    folder.mkdir(parents=True, exist_ok=True)
    line = {"loss": 2.0, "step_seconds": seconds, "tokens_per_second": 1000.0, "time": 1000.0}
    lines = [json.dumps({**line, "step": step}) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
