"""Law 6 through a whole run: damaged blocks stop it, or become holes that log, metrics, ledger, report count alike."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from data_pipeline.damage import Damage, read_ledger
from data_pipeline.explain import explain
from data_pipeline.manifest import read_manifest
from data_pipeline.stream import open_stream
from pretrain.config import load_config
from pretrain.monitor import read_attempts, read_metrics
from pretrain.report import write_report

from .runs import Runs

STEPS, BATCH = 20, 8


@pytest.fixture
def damaged(runs: Runs, tmp_path: Path) -> Runs:
    """A copy of the tiny data set in which one bit of every twelfth block of domain a is turned over."""
    copy = tmp_path / "damaged"
    shutil.copytree(runs.data, copy)
    manifest = read_manifest(copy)
    (shard,) = manifest.select("a", "train")
    path = copy / "shards" / f"{shard.name}.tar"
    content = bytearray(path.read_bytes())
    for block in BLOCKS:
        content[manifest.layout.data_offset(block) + 5] ^= 1
    path.write_bytes(content)
    return Runs(tmp_path, copy)


BLOCKS = range(3, 180, 12)


def expected_holes(runs: Runs, config: Path) -> list[int]:
    """The positions of the run whose sequence lies in a damaged block, from the order alone."""
    settings = load_config(config)
    stream = open_stream(settings.data, settings.run.seed)
    located = stream.order.locate(0, STEPS * BATCH)
    a = stream.names.index("a")
    return [
        position
        for position, (source, sequence) in enumerate(zip(located.source, located.sequence, strict=True))
        if source == a and stream.sources[a].place(int(sequence)).block in BLOCKS
    ]


@pytest.mark.slow
def test_holes_are_counted_alike_everywhere_also_after_a_kill(damaged: Runs) -> None:
    holes = {"on_damage": "hole", "max_hole_fraction": 1.0}
    data = {**damaged_data(damaged), **holes}
    config = damaged.config("whole", data=data)
    expected = expected_holes(damaged, config)
    assert len(expected) >= 4, "the damage is not met"
    done = damaged.train(config)
    assert done.returncode == 0, done.stderr
    folder = damaged.run_folder("whole")
    steps = [line for line in read_metrics(folder) if "loss" in line and "evaluation" not in line]
    events = [line for line in read_metrics(folder) if line.get("event") == "damage"]
    assert [hole.damage.position for hole in read_ledger(folder / "damage")] == expected
    assert steps[-1]["holes"] == len(expected)
    explained = [row for step in range(1, STEPS + 1) for row in explain(folder, step, None, None, True)]
    assert sorted(row.position for row in explained if row.hole) == expected
    assert sorted(row.position for row in explained if not row.documents) == expected
    assert sum(line["new_holes"] for line in events) == len(expected)
    assert {line["step"] for line in events} == {position // BATCH + 1 for position in expected}
    assert all(re.search(r"block \d+ at byte .*: checksum", line["message"]) for line in events)
    told = re.findall(r"step \d+: damage: .* new_holes=(\d+)", done.stdout)
    assert sum(map(int, told)) == len(expected)
    page = write_report(folder).read_text()
    assert re.search(rf"skipped / holes.*?0 / {len(expected)}\b", page, re.DOTALL)

    again = damaged.config("again", data=data)
    killed = damaged.train(again, fault="step:13")
    assert killed.returncode != 0
    assert damaged.train(again).returncode == 0
    assert damaged.metrics("again") == damaged.metrics("whole")
    assert damaged.state_hashes("again", STEPS) == damaged.state_hashes("whole", STEPS)
    assert holes_of(damaged.run_folder("again")) == holes_of(folder)


@pytest.mark.slow
def test_damage_stops_a_run_or_bounds_its_holes(damaged: Runs) -> None:
    config = damaged.config("stop", data=damaged_data(damaged))
    first = expected_holes(damaged, config)[0] // BATCH + 1
    stopped = damaged.train(config)
    assert "CRC32C" in stopped.stderr
    assert "pretrain-data verify" in stopped.stderr
    assert "data.on_damage=hole lets a run go on without the damaged blocks" in stopped.stderr
    assert stopped.stderr.count("CRC32C is") == 1, "one rank tells it for all"
    ended = read_attempts(damaged.run_folder("stop"))[-1]
    assert (ended.reason, ended.exit_code, ended.last_step) == ("user_error", 2, first - 1)

    bounded = damaged.config("bounded", data={**damaged_data(damaged), "on_damage": "hole"})
    too_many = damaged.train(bounded)
    assert f"step {first} has " in too_many.stderr
    assert "data.max_hole_fraction = 0.001 of the run's sequences allows (0)" in too_many.stderr
    if first > 1:
        assert f"saved {damaged.run_folder('bounded')}/checkpoints/step_{first - 1:09d}" in too_many.stdout
    allowed = damaged.train(bounded, "data.max_hole_fraction=1.0")
    assert allowed.returncode == 0, allowed.stderr
    assert f"resumes from {damaged.run_folder('bounded')}/checkpoints/step_{first - 1:09d}" in allowed.stdout


@pytest.mark.slow
def test_what_is_trained_anew_on_restored_data_is_listed_no_more(damaged: Runs, runs: Runs) -> None:
    config = damaged.config("run", data={**damaged_data(damaged), "on_damage": "hole", "max_hole_fraction": 1.0})
    holes = expected_holes(damaged, config)
    lost, kept = [[hole for hole in holes if (hole // BATCH >= 12) is late] for late in (True, False)]
    assert lost, "no hole after the checkpoint"
    assert kept, "no hole before the checkpoint"
    assert damaged.train(config, fault=f"step:{lost[0] // BATCH + 1}", ranks=1).returncode != 0
    folder = damaged.run_folder("run")
    assert lost[0] in [hole.damage.position for hole in read_ledger(folder / "damage")]
    shutil.copytree(runs.data, damaged.data, dirs_exist_ok=True)
    done = damaged.train(config, "data.on_damage=stop", "data.max_hole_fraction=0.001", ranks=1)
    assert done.returncode == 0, done.stderr
    assert [hole.damage.position for hole in read_ledger(folder / "damage")] == kept
    assert [line["holes"] for line in read_metrics(folder) if "objective" in line][-1] == len(kept)


@pytest.mark.slow
def test_a_run_that_begins_with_anothers_state_has_its_holes(damaged: Runs) -> None:
    data = {**damaged_data(damaged), "on_damage": "hole", "max_hole_fraction": 1.0}
    first = damaged.config("first", data=data)
    assert damaged.train(first, "training.steps=8", ranks=1).returncode == 0
    origin = damaged.run_folder("first") / "checkpoints/step_000000008"
    second = damaged.config("second", data=data)
    assert damaged.train(second, f"resume={origin}", ranks=1).returncode == 0
    folder = damaged.run_folder("second")
    expected = expected_holes(damaged, second)
    lines = read_metrics(folder)
    assert [hole.damage.position for hole in read_ledger(folder / "damage")] == expected
    assert [line["holes"] for line in lines if "loss" in line and "evaluation" not in line][-1] == len(expected)
    assert sum(line["new_holes"] for line in lines if line.get("event") == "damage") == len(expected)


def holes_of(folder: Path) -> list[tuple[int, int, Damage]]:
    return [(hole.step, hole.rank, hole.damage) for hole in read_ledger(folder / "damage")]


def damaged_data(runs: Runs) -> dict[str, object]:
    return {
        "sources": {
            "a": {"path": str(runs.data), "domain": "a", "max_epochs": None},
            "b": {"path": str(runs.data), "domain": "b", "max_epochs": None, "weight": 0.5},
        }
    }
