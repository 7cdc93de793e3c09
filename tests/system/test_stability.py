"""Incidents through whole runs: steps are left out or the run goes back, with the same bits after a kill."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.engine.weights import load_weights
from pretrain.monitor import read_attempts, read_metrics
from pretrain.report import write_report
from pretrain.stability.rollbacks import read_rollbacks
from tests.marks import campaign

from .runs import Runs

BATCH, STEPS = 8, 16
BAD_STEP = 3
"""From 0: its gradient is NaN on rank 1."""
SPIKE = 12 * BATCH + 5
"""A position of step 13 (from 1), whose logits are a thousand times too large."""
MIXTURE = {"number": 4, "top_k": 2, "intermediate_size": 12, "score": "sigmoid", "selection_bias": True}
BALANCING = {
    "losses": [
        {"kind": "load_balance", "coefficient": 0.1, "frequencies": way} for way in ("previous_step", "running")
    ],
    "bias": {"rate": 0.01},
}


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {"kind": "muon"},
    "galore": {"kind": "galore", "rank": 4, "gap": 5, "lr": 3e-3},  # other projections from steps 11 and 16 on
}


def settings(
    stage: int, action: str, divided: int = 0, optimizer: str = "adamw", asynchronous: bool = False
) -> dict[str, Any]:
    """``divided``: the expert-parallel ranks of a mixture of experts whose balancing remembers; 0: without experts."""
    balancing = {"balancing": BALANCING} if divided else {}
    return {
        **({"model": {"experts": MIXTURE}} if divided else {}),
        "objective": {"reweighting": {"strategy": "uniform"}, **balancing},
        "training": {"steps": STEPS, "micro_batch": 2},
        "engine": {"zero_stage": stage, "expert_parallel": max(divided, 1)},
        "optimizer": OPTIMIZERS[optimizer],
        "checkpoint": {"asynchronous": asynchronous},
        "evaluation": {"every_steps": None},
        "monitor": {"tensorboard": action == "rollback"},
        "stability": {"spike": {"action": action, "window": 16, "least": 8}},
    }


def incidents(runs: Runs, name: str) -> list[tuple[str, int]]:
    return [(line["event"], line["step"]) for line in runs.metrics(name) if "event" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "divided", "optimizer", "asynchronous"),
    [
        (1, 2, "muon", True),
        *(campaign(stage, 0, "adamw", way) for stage in range(4) for way in (False, True)),
        *(campaign(*case, "adamw", way) for case in ((0, 2), (1, 2), (2, 2), (3, 1)) for way in (False, True)),
        *(campaign(stage, 0, "muon", stage % 2 == 0) for stage in range(4)),
        *(campaign(stage, divided, "galore", stage != 1) for stage in range(3) for divided in (0, 2)),
    ],
)
def test_a_spike_is_gone_back_from_and_its_range_left_out_also_after_a_kill(
    runs: Runs, stage: int, divided: int, optimizer: str, asynchronous: bool
) -> None:
    """Where saves go on beside the training, the checkpoint to go back to is being written when the spike is met."""
    given = (stage, "rollback", divided, optimizer)
    faults = f"gradient:{BAD_STEP},spike:{SPIKE}"
    whole = runs.config("whole", **settings(*given, asynchronous))
    done = runs.train(whole, fault=faults)
    assert done.returncode == 0, done.stderr
    folder = runs.run_folder("whole")
    # the spike is met in step 13; the newest checkpoint is of step 12, so one step's positions are left out
    assert incidents(runs, "whole") == [("non_finite", BAD_STEP + 1), ("rollback", 12)]
    first, second = read_attempts(folder)
    assert (first.reason, first.last_step, second.first_step, second.reason) == ("rolled_back", 12, 13, "done")
    assert f"position {SPIKE} of source" in first.message
    steps = [line for line in read_metrics(folder) if "objective" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert [line["skipped"] for line in steps] == [int(step >= BAD_STEP) for step in range(STEPS)]
    assert steps[12]["position"] == 14 * BATCH, "step 13 has taken the positions after the range"
    if divided:
        assert_moved_by_made_steps(folder, steps)
    page = Path(write_report(folder)).read_text()
    assert "The run went back to step 12 and leaves out the positions 96 to 103" in page
    assert "rolled-back" in page

    # the run whose user leaves the same range out
    range_left_out = {"skip_ranges": [[96, 104]], **json_data(runs)}
    by_hand = runs.config("by_hand", **settings(*given), data=range_left_out)  # saves that are waited for
    reference = runs.train(by_hand, fault=faults)
    assert reference.returncode == 0, reference.stderr
    assert incidents(runs, "by_hand") == [("non_finite", BAD_STEP + 1)]
    assert runs.state_hashes("by_hand", STEPS) == runs.state_hashes("whole", STEPS)

    # killed before the first checkpoint after the incident
    broken = runs.config("broken", **settings(*given, asynchronous))
    assert runs.train(broken, fault=f"{faults},step:14").returncode != 0
    assert read_attempts(runs.run_folder("broken"))[0].reason == "rolled_back"
    resumed = runs.train(broken, fault=faults)
    assert resumed.returncode == 0, resumed.stderr
    assert runs.metrics("broken") == runs.metrics("whole")
    assert runs.state_hashes("broken", STEPS) == runs.state_hashes("whole", STEPS)
    states = [
        json.loads((runs.run_folder(name) / "checkpoints/step_000000016/state.json").read_text())
        for name in ("whole", "broken")
    ]
    assert states[0] == {**states[1], "config": states[0]["config"]}
    assert (states[0]["left_out"], states[0]["skips"], len(states[0]["losses"])) == ([[96, 104]], [BAD_STEP + 1], 15)
    frequencies = states[0]["expert_frequencies"]
    assert sorted(frequencies or ()) == (["global_batch_previous_step", "global_batch_running"] if divided else [])


def assert_moved_by_made_steps(folder: Path, steps: list[dict[str, Any]]) -> None:
    """Every bias is the sum of what the loads of the steps say whose update was made, of those alone."""
    weights = load_weights(folder / f"checkpoints/step_{STEPS:09d}")
    for block in (0, 1):
        bias = weights[f"blocks.{block}.feed_forward.router.selection_bias"]
        made = [line for line in steps if line["step"] != BAD_STEP + 1]
        loads = torch.tensor([line[f"experts/load/{block}"] for line in made])
        assert bias == pytest.approx(0.01 * torch.sign(0.25 - loads).sum(dim=0), abs=1e-6)


def json_data(runs: Runs) -> dict[str, Any]:
    return {
        "seq_len": 32,
        "sources": {
            "a": {"path": str(runs.data), "domain": "a", "max_epochs": None},
            "b": {"path": str(runs.data), "domain": "b", "max_epochs": None, "weight": 0.5},
        },
    }


@pytest.mark.slow
def test_going_back_takes_the_second_place_where_it_has_a_newer_checkpoint(runs: Runs, tmp_path: Path) -> None:
    """The run folder loses the checkpoint of step 12 before the spike in step 13: the one of step 8 is left there."""
    second = {"checkpoint": {"second": {"path": str(tmp_path / "second")}}}
    config = runs.config("run", **{**settings(1, "rollback"), **second})
    done = runs.train(config, fault=f"spike:{SPIKE},lose:3", ranks=1)
    assert done.returncode == 0, done.stderr
    assert "The run goes back to step_000000012 and leaves out the positions 96 to 103" in done.stderr
    first, again = read_attempts(runs.run_folder("run"))
    assert (first.reason, again.first_step, again.reason) == ("rolled_back", 13, "done")
    (rollback,) = read_rollbacks(runs.run_folder("run"))
    assert (rollback.resumed_step, rollback.start, rollback.stop) == (12, 96, 104)
    (told,) = (line["message"] for line in runs.metrics("run") if line.get("event") == "rollback")
    assert told.endswith("The run went back to step 12 and leaves out the positions 96 to 103")
    steps = [line for line in runs.metrics("run") if "objective" in line]
    assert steps[12]["position"] == 14 * BATCH, "step 13 has taken the positions after the range"
    state = json.loads((runs.run_folder("run") / "checkpoints/step_000000016/state.json").read_text())
    assert state["left_out"] == [[96, 104]]


@pytest.mark.slow
def test_a_step_computed_again_tells_bad_data_from_a_bad_device(runs: Runs) -> None:
    stability = {"spike": {"window": 16, "least": 8}, "deterministic": True, "rerun": True}
    config = runs.config("run", **{**settings(2, "skip"), "stability": stability})
    done = runs.train(config, fault=f"gradient:{BAD_STEP},flip:9,spike:{SPIKE}")
    assert done.returncode == 0, done.stderr
    assert incidents(runs, "run") == [("non_finite", BAD_STEP + 1), ("spike", 10), ("spike", 13)]
    gradient, device, data = [str(line["message"]) for line in runs.metrics("run") if "event" in line]
    assert "No sample's own loss is not finite. Computed again it came to the same bits" in gradient
    assert f": hardware, on rank 1 on {socket.gethostname()}" in device
    assert f"The highest losses: position {SPIKE} of source" in data
    assert data.endswith("Computed again it came to the same bits: the data or the arithmetic, not the hardware")
    assert [line["skipped"] for line in runs.metrics("run") if "objective" in line][-1] == 3


@pytest.mark.slow
def test_an_update_that_overflows_is_never_saved(runs: Runs) -> None:
    config = runs.config("run", optimizer={"lr": 1e39}, checkpoint={"every_steps": 1}, evaluation={"every_steps": None})
    done = runs.train(config, ranks=1)
    assert done.returncode != 0
    assert "after step 1 weights or optimizer state are not finite (" in done.stderr
    assert "an update has overflowed. No checkpoint was written." in done.stderr
    assert list((runs.run_folder("run") / "checkpoints").iterdir()) == []
    assert read_attempts(runs.run_folder("run"))[-1].reason == "non_finite"
