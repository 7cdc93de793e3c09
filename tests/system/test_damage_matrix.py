"""The damage matrix through whole runs: every case of a place in one run, a source each; all counts are the same.

``tests/data_pipeline/test_damage.py`` holds each cell by itself, its tokens and its message.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.damage import HOLES_ADVICE, read_ledger
from data_pipeline.layout import shard_path
from data_pipeline.stream import open_stream
from pretrain.config import load_config
from pretrain.monitor import read_metrics
from pretrain.report import write_report
from tests.data_pipeline.test_damage import CASES, SEQ, write_whole
from tests.http_server import HttpServer

from .runs import Runs

BATCH, STEPS = 24, 160


@pytest.fixture(params=["local", "local windowed", "http", "http windowed", "pipe"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Runs, dict[str, Any]]]:
    """A data set for each case, and the settings of a run that reads them all where they lie. They differ, or the
    node's cache would give one what is whole in another."""
    sets = tmp_path / "sets"
    for number, (name, case) in enumerate(CASES.items()):
        case.damage(shard_path(write_whole(sets / name.replace(" ", "_"), number), "000001"))
    where, _, windowed = request.param.partition(" ")
    with ExitStack() as stack:
        root = f"pipe:cat {sets}/NAME/{{}}" if where == "pipe" else f"{sets}/NAME"
        if where == "http":
            root = f"{stack.enter_context(HttpServer(sets)).url}/NAME"
        sources = {name: {"path": root.replace("NAME", name.replace(" ", "_")), "max_epochs": None} for name in CASES}
        data: dict[str, Any] = {
            "sources": sources, "seq_len": SEQ, "cache": {"folder": str(tmp_path / "cache")},
            "remote": {"attempts": 2, "first_backoff_seconds": 0.001, "longest_backoff_seconds": 0.001},
        }  # fmt: skip
        if windowed:
            data |= {"order": "windowed", "windows": {"strata": 2, "tokens": 8 * SEQ}}
        yield Runs(tmp_path, sets), data


def expected_holes(config: Path) -> dict[int, tuple[str, str]]:
    """The source and the reason at every position whose block is lost, from the order and the cases alone."""
    settings = load_config(config)
    stream = open_stream(settings.data, settings.run.seed)
    located = stream.order.locate(0, STEPS * BATCH)
    found = {}
    for position, (source, sequence) in enumerate(zip(located.source, located.sequence, strict=True)):
        name = stream.names[source]
        at = stream.sources[source].place(int(sequence))
        lost = {"000001": CASES[name].lost, "000002": CASES[name].other or {}}.get(at.shard, {})
        if at.block in lost:
            found[position] = name, lost[at.block]
    stream.close()
    return found


@pytest.mark.campaign
def test_every_case_counts_alike_in_log_metrics_ledger_and_report(place: tuple[Runs, dict[str, Any]]) -> None:
    runs, data = place
    config = runs.config(
        "matrix", data={**data, "on_damage": "hole", "max_hole_fraction": 1.0},
        training={"steps": STEPS, "global_batch": BATCH, "micro_batch": 4}, evaluation={"every_steps": None},
        checkpoint={"every_steps": None},
    )  # fmt: skip
    expected = expected_holes(config)
    lossy = {name for name, case in CASES.items() if case.lost}
    assert {name for name, _ in expected.values()} == lossy, "some damage is not met"
    done = runs.train(config, ranks=2)
    assert done.returncode == 0, done.stderr
    folder = runs.run_folder("matrix")
    listed = {
        entry.damage.position: (entry.damage.source, entry.damage.reason) for entry in read_ledger(folder / "damage")
    }
    assert listed == expected
    lines = read_metrics(folder)
    events = [line for line in lines if line.get("event") == "damage"]
    assert [line["holes"] for line in lines if "objective" in line][-1] == len(expected)
    by_step: Counter[int] = Counter()
    for line in events:
        by_step[line["step"]] += line["new_holes"]
    assert by_step == Counter(position // BATCH + 1 for position in expected)
    assert sum(map(int, re.findall(r"step \d+: damage: .* new_holes=(\d+)", done.stdout))) == len(expected)
    rebuild = "`pretrain-data verify --rebuild-sidecars FOLDER` writes it again"
    assert all(("index" in line["message"]) == (rebuild in line["message"]) for line in events)
    page = write_report(folder).read_text()
    assert re.search(rf"skipped / holes.*?0 / {len(expected)}\b", page, re.DOTALL)


@pytest.mark.campaign
@pytest.mark.parametrize("name", ["payload", "missing"])
def test_a_run_that_stops_says_what_the_reader_says(place: tuple[Runs, dict[str, Any]], name: str) -> None:
    runs, data = place
    config = runs.config(
        "stop", data={**data, "sources": {name: data["sources"][name]}}, training={"steps": 40},
        evaluation={"every_steps": None},
    )  # fmt: skip
    stopped = runs.train(config, ranks=1)
    assert stopped.returncode != 0
    assert HOLES_ADVICE in stopped.stderr
    assert "000001.tar" in stopped.stderr
    if name == "payload":
        assert re.search(r"000001\.tar, block 5 at byte offset \d+ is damaged: its CRC32C is", stopped.stderr)
