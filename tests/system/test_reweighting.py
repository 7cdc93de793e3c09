"""Reweighting in whole runs: one pass resumes to the bit, scoring is told, bad samples are dropped and named."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.monitor import read_attempts, read_metrics
from pretrain.report import write_report
from tests.marks import campaign

from .runs import Runs


def reweighting(group: str, strategy: str = "linupper", **given: Any) -> dict[str, Any]:
    return {"reweighting": {"strategy": strategy, "group": group, **({"temperature": 0.4, **given} if given else {})}}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [campaign(1), 3])
def test_one_pass_resumes_to_the_bit(runs: Runs, stage: int) -> None:
    """The range of the step before is in the checkpoint; without it the first step after the resume were uniform."""
    sections = {
        "objective": reweighting("global_batch_one_pass", warmup={"temperature": 4.0, "steps": 6, "change": "cosine"}),
        "engine": {"zero_stage": stage},
        "training": {"steps": 8},
        "checkpoint": {"every_steps": 3},
    }
    straight = runs.train(runs.config("straight", **sections))
    assert straight.returncode == 0, straight.stderr
    broken = runs.config("broken", **sections)
    assert runs.train(broken, fault="step:7").returncode != 0
    resumed = runs.train(broken)
    assert resumed.returncode == 0, resumed.stderr
    assert read_attempts(runs.run_folder("broken"))[-1].first_step == 7
    assert runs.state_hashes("straight", 8) == runs.state_hashes("broken", 8)
    assert runs.metrics("straight") == runs.metrics("broken")
    lines = [line for line in runs.metrics("broken") if "objective" in line]
    assert lines[0]["weights/ess"] == 1.0
    assert lines[6]["weights/ess"] < 0.99, "the step after the resume"
    assert [line["weights/temperature"] for line in lines[6:]] == [0.4, 0.4]
    state = json.loads((runs.run_folder("broken") / "checkpoints/step_000000006/state.json").read_text())
    assert state["loss_range"]["highest"] == lines[5]["weights/loss_max"]


@pytest.mark.slow
def test_a_scoring_pass_is_told_and_changes_only_the_weights(runs: Runs) -> None:
    """An update with a scoring pass whose result is not used is that without one; small groups are warned of."""
    training = {"training": {"steps": 3}}
    scored = runs.train(runs.config("scored", objective=reweighting("global_batch", cap=1.0), **training))
    plain = runs.train(runs.config("plain", objective=reweighting("micro_step", cap=1.0), **training))
    assert scored.returncode == plain.returncode == 0, scored.stderr + plain.stderr
    assert runs.state_hashes("scored", 3) == runs.state_hashes("plain", 3)
    lines = [line for line in read_metrics(runs.run_folder("scored")) if "objective" in line]
    assert all(0 < line["weights/scoring_seconds"] < line["step_seconds"] for line in lines)
    assert "weights/scoring_seconds" not in read_metrics(runs.run_folder("plain"))[0]
    assert "groups of only 4 samples" in plain.stderr
    assert "groups of only" not in scored.stderr


def explained(message: str, number: int) -> dict[str, Any]:
    """What the command in a message prints."""
    command = shlex.split(message.split("`")[1])
    assert command[0] == "pretrain-data"
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "data_pipeline", *command[1:], "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == number
    row: dict[str, Any] = rows[0]
    return row


POSITION = 21
"""Of the third step of 8: its row 5, in the second micro-step of 2 x 2 the second row of rank 0."""


@pytest.mark.slow
@pytest.mark.parametrize("group", ["micro_step", "global_batch_one_pass", "global_batch"])
def test_a_sample_without_a_finite_loss_is_dropped_and_named(runs: Runs, group: str) -> None:
    config = runs.config("run", objective=reweighting(group), training={"steps": 4})
    done = runs.train(config, fault=f"logits:{POSITION}")
    assert done.returncode == 0, done.stderr
    (event,) = [line for line in runs.metrics("run") if "event" in line]
    assert (event["event"], event["step"]) == ("dropped_samples", 3)
    row = explained(event["message"], 1)
    assert (row["position"], row["rank"], row["row"], row["step"]) == (POSITION, 0, 3, 3)
    assert f"position {POSITION} of source {row['source']!r}" in event["message"]
    assert event["message"] in done.stdout
    lines = [line for line in runs.metrics("run") if "objective" in line]
    assert [line["weights/dropped"] for line in lines] == [0, 0, 1, 1]
    assert all(isinstance(line["grad_norm"], float) and line["grad_norm"] < 1e3 for line in lines)
    page = Path(write_report(runs.run_folder("run"))).read_text()
    assert "dropped samples" in page
    state = json.loads((runs.run_folder("run") / "checkpoints/step_000000004/state.json").read_text())
    assert state["dropped"] == 1


@pytest.mark.slow
def test_what_can_not_be_dropped_stops_the_run_where_that_is_asked_for(runs: Runs) -> None:
    strict = {"non_finite": "stop"}
    config = runs.config("run", objective=reweighting("micro_step"), training={"steps": 4}, stability=strict)
    done = runs.train(config, fault=f"below:{POSITION}")
    assert done.returncode != 0
    assert read_attempts(runs.run_folder("run"))[-1].reason == "non_finite"
    assert f"Samples without a finite loss: position {POSITION} of source" in done.stderr
    assert "nothing after step 2 was saved" in done.stderr


@pytest.mark.slow
def test_without_weights_the_step_of_a_sample_without_a_finite_loss_is_left_out(runs: Runs) -> None:
    uniform = {"reweighting": {"strategy": "uniform"}}
    done = runs.train(runs.config("run", objective=uniform, training={"steps": 4}), fault=f"logits:{POSITION}")
    assert done.returncode == 0, done.stderr
    (event,) = [line for line in runs.metrics("run") if "event" in line]
    assert (event["event"], event["step"], event["action"]) == ("non_finite", 3, "skip")
    row = explained(event["message"], 1)
    assert (row["position"], row["rank"], row["row"], row["step"]) == (POSITION, 0, 3, 3)
    assert row["documents"][0]["id"] in event["message"]
    lines = [line for line in runs.metrics("run") if "objective" in line]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1]
    assert [line["position"] for line in lines] == [8, 16, 24, 32], "its positions are consumed"
