"""What the checks of a job's nodes (:mod:`launch.node_check`) come to: which node is broken, which is slow."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEADLINE_SECONDS = 60
STAGES = ("device", "memory", "files", "network")
SLOW = {"tflops": 0.7, "file_mb_per_s": 0.2, "link_mb_per_s": 0.3}
"""A node is slow where it has less than this part of the median node's: files and links vary more than arithmetic."""
NAMES = {"tflops": "TFLOP/s", "file_mb_per_s": "MB/s of files", "link_mb_per_s": "MB/s between nodes"}


@dataclass(frozen=True)
class Nodes:
    """What is known of a job's nodes."""

    broken: dict[str, str]
    """Node to what is wrong with it."""
    slow: dict[str, str]
    unknown: str
    """What failed between the nodes, no one in particular; empty if nothing did."""
    summary: str

    @property
    def fit(self) -> bool:
        return not self.broken and not self.unknown


def read_checks(logs: Path, names: Sequence[str]) -> Nodes:
    """Compare what the ranks wrote into ``logs``.

    Args:
        logs: where the ``rank_NNNNN.json`` are.
        names: of the nodes, in Slurm's order. A node of which no rank wrote anything is broken.
    """
    reports: dict[int, dict[str, Any]] = {}
    for path in logs.glob("rank_*.json"):
        report = json.loads(path.read_bytes())
        reports[report["rank"]] = report
    broken, measured, network = {}, {}, []
    ranks_per_node = max((report["ranks_per_node"] for report in reports.values()), default=1)
    for number, name in enumerate(names):
        own = {rank: reports.get(rank) for rank in range(number * ranks_per_node, (number + 1) * ranks_per_node)}
        wrong = [_wrong(rank, report) for rank, report in own.items()]
        if any(wrong):
            broken[name] = "; ".join(filter(None, wrong))
        found = [report for report in own.values() if report]
        network += [told for report in found if (told := _lost(report))]
        measured[name] = {
            key: min(values) for key in SLOW if (values := [r["measured"][key] for r in found if key in r["measured"]])
        }
    # a broken node breaks the others' collectives: those are its symptoms
    unknown = "; ".join(network[:3]) if network and not broken else ""
    return Nodes(broken, _slow(measured), unknown, _summary(measured))


def _wrong(rank: int, report: dict[str, Any] | None) -> str:
    if report is None:
        return f"rank {rank} said nothing within {DEADLINE_SECONDS} s"
    own = [f"{stage}: {text}" for stage, text in report["errors"].items() if stage != STAGES[-1]]
    missing = [stage for stage in STAGES[:-1] if stage not in report["done"]]
    if missing:
        own.append(f"did not end the check of its {missing[0]} within {DEADLINE_SECONDS} s")
    return f"rank {rank}: {', '.join(own)}" if own else ""


def _lost(report: dict[str, Any]) -> str:
    late = "" if STAGES[-1] in report["done"] else f"it did not end within {DEADLINE_SECONDS} s"
    told = report["errors"].get(STAGES[-1], late)
    return f"rank {report['rank']}: {told}" if told else ""


def _slow(measured: dict[str, dict[str, float]]) -> dict[str, str]:
    slow: dict[str, str] = {}
    for key, part in SLOW.items():
        values = {name: own[key] for name, own in measured.items() if key in own}
        median = statistics.median(values.values()) if values else 0.0
        for name, value in values.items():
            if value < part * median:
                told = f"{value:.3g} {NAMES[key]}, the median node has {median:.3g}"
                slow[name] = f"{slow[name]}; {told}" if name in slow else told
    return slow


def _summary(measured: dict[str, dict[str, float]]) -> str:
    told = []
    for key, unit in NAMES.items():
        if values := [own[key] for own in measured.values() if key in own]:
            told.append(f"{min(values):.3g} to {max(values):.3g} {unit}")
    return f"{len(measured)} nodes: {', '.join(told) or 'nothing measured'}"
