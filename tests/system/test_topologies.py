"""Law 5, other topologies: one run on 4, 2, 3 and 1 ranks and ZeRO 3, 1, 2 and 0 in turn, as its user starts it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from data_pipeline.errors import UserError
from data_pipeline.explain import ExplainedRow, explain
from pretrain.monitor import read_attempts

from .runs import Runs, environment

LEGS = ((4, 3), (2, 1), (3, 2), (1, 0))
"""Ranks and ZeRO stage of four steps each."""
STEPS = 4
TOLERANCE = 1e-6
"""Relative, of a step's loss, in fp32; ten times as much of the objective. Measured on two CPU cores: at most 3e-8 and
2e-7 in these 16 steps."""


def rows(runs: Runs, name: str, step: int) -> list[ExplainedRow]:
    return sorted(explain(runs.run_folder(name), step, None, None, False), key=lambda row: row.position)


@pytest.mark.slow
def test_one_run_on_many_topologies(runs: Runs) -> None:
    sections = {
        "training": {"steps": STEPS * len(LEGS), "global_batch": 12, "micro_batch": 1, "precision": "fp32"},
        # a group that is the same on all topologies
        "objective": {"reweighting": {"strategy": "linupper", "temperature": 1.0, "group": "global_batch_one_pass"}},
        "optimizer": {"lr": 3e-3, "eps": 1e-5},
        "schedule": {"name": "constant", "warmup_steps": 2},
        "evaluation": {"every_steps": None},
    }
    straight = runs.train(runs.config("straight", **sections))
    assert straight.returncode == 0, straight.stderr
    moving = runs.config("moving", **sections)
    said = []
    for number, (ranks, stage) in enumerate(LEGS, start=1):
        settings = [f"training.steps={STEPS * number}", f"engine.zero_stage={stage}"]
        settings += ["engine.persistence_threshold=0"] if stage == 3 else []
        leg = runs.train(moving, *settings, ranks=ranks)
        assert leg.returncode == 0, leg.stderr
        said.append(leg.stdout)

    there, here = runs.metrics("straight"), runs.metrics("moving")
    assert [line["step"] for line in there] == [line["step"] for line in here] == list(range(1, 17))
    for a, b in zip(there, here, strict=True):
        assert (a["position"], a["tokens"]) == (b["position"], b["tokens"])
        assert b["loss"] == pytest.approx(a["loss"], rel=TOLERANCE), a["step"]
        assert b["objective"] == pytest.approx(a["objective"], rel=10 * TOLERANCE), a["step"]

    # the same samples, and each named with the rank and row that read it on the topology of its time
    for number, (ranks, _) in enumerate(LEGS):
        step = STEPS * number + 2
        one, other = rows(runs, "straight", step), rows(runs, "moving", step)
        assert [row.documents for row in one] == [row.documents for row in other]
        assert [row.rank for row in other] == [place % ranks for place in range(12)]
    with pytest.raises(UserError, match="rank"):
        list(explain(runs.run_folder("moving"), STEPS + 1, 2, 0, False))

    changes = [attempt.topology_changes for attempt in read_attempts(runs.run_folder("moving"))]
    assert changes == [
        (),
        ("world_size: 4 -> 2", "zero_stage: 3 -> 1"),
        ("world_size: 2 -> 3", "zero_stage: 1 -> 2"),
        ("world_size: 3 -> 1", "zero_stage: 2 -> 0"),
    ]
    for told, expected in zip(said, changes, strict=True):
        assert told.count("topology changed since that checkpoint: ") == len(expected)
        assert all(f"topology changed since that checkpoint: {change}\n" in told for change in expected)
    newest = runs.run_folder("moving") / "checkpoints" / f"step_{STEPS * len(LEGS):09d}"
    command = [sys.executable, "-m", "pretrain", "verify-checkpoint", str(newest)]
    verified = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert "21 parameters, whole, saved by 1 ranks at ZeRO stage 0" in verified.stdout, verified.stderr
