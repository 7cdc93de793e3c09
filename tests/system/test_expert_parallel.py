"""The demo of experts on two expert-parallel ranks, under the real launcher: it learns and stays balanced; from its
checkpoint it goes on with whole experts, and one process evaluates it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.evaluate_run import evaluate_run
from pretrain.monitor import read_metrics

from . import test_damage
from .runs import Runs, environment

damaged = test_damage.damaged
ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs/moe_demo.yaml"
SHORT = {
    "data.seq_len": 64,
    "data.prefetch": 0,
    "training.global_batch": 8,
    "training.micro_batch": 2,
    "training.steps": 40,
    "objective.reweighting.start_step": 10,
    "schedule.warmup_steps": 5,
    "checkpoint.every_steps": 40,
    "evaluation": "{every_steps: 40, sequences: 8}",
    "monitor.tensorboard": "false",
    "engine.expert_parallel": 2,
}


def overrides(runs: Runs, sources: dict[str, str], **given: object) -> list[str]:
    data = [f"data.sources.{name}={{path: {path}, max_epochs: null}}" for name, path in sources.items()]
    return [f"run.folder={runs.folder / 'runs'}", *data, *(f"{key}={value}" for key, value in given.items())]


def assert_learns_in_balance(folder: Path, steps: int, fallen: float, imbalance: float) -> None:
    """The loss of the last tenth is lower by ``fallen`` nats; no block's busiest expert is busier than ``imbalance``
    times the mean in the last tenth, on the mean."""
    lines = [line for line in read_metrics(folder) if "objective" in line]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert all(math.isfinite(line[key]) for line in lines for key in ("loss", "objective", "grad_norm"))
    tenth = steps // 10
    first, last = (sum(line["loss"] for line in part) / tenth for part in (lines[:tenth], lines[-tenth:]))
    assert last < first - fallen, (first, last)
    mean = sum(line["experts/imbalance"] for line in lines[-tenth:]) / tenth
    assert mean < imbalance, mean


@pytest.mark.slow
def test_divided_experts_learn_in_balance_and_go_on_as_whole_ones(runs: Runs) -> None:
    sources = {"code": f"{runs.data}, domain: a", "docs": f"{runs.data}, domain: b"}
    done = runs.train(DEMO, *overrides(runs, sources, **SHORT))
    assert done.returncode == 0, done.stderr
    folder = runs.run_folder("moe_demo")
    assert_learns_in_balance(folder, 40, fallen=0.2, imbalance=5.0)  # 8 is two experts for all; 40 steps are few
    logged = [line for line in read_metrics(folder) if "evaluation" in line][-1]
    assert evaluate_run(folder, None, 8)["loss"] == pytest.approx(logged["loss"], rel=1e-2)
    more = {**SHORT, "training.steps": 42, "engine.expert_parallel": 1, "engine.zero_stage": 1}
    done = runs.train(DEMO, *overrides(runs, sources, **more))
    assert done.returncode == 0, done.stderr
    assert "expert_parallel: 2 -> 1" in done.stdout + done.stderr
    steps = [line for line in read_metrics(folder) if "objective" in line]
    assert [line["step"] for line in steps[-2:]] == [41, 42]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.2


@pytest.mark.campaign
def test_divided_experts_beside_damage_train_as_whole_ones(damaged: Runs) -> None:
    """Damaged sequences are holes, and with one sequence in a micro-batch the whole of a rank's."""
    experts = {"number": 4, "top_k": 2, "intermediate_size": 16, "capacity": {"factor": 0.7}, "jitter": 0.1}
    sections = {
        "model": {"experts": experts},
        "objective": {"balancing": {"losses": [{"kind": "load_balance", "coefficient": 0.1}]}},
        "data": {**test_damage.damaged_data(damaged), "on_damage": "hole", "max_hole_fraction": 1.0},
        "training": {"micro_batch": 1},
    }
    found = []
    for size in (1, 2):
        done = damaged.train(damaged.config(f"{size}", **sections, engine={"expert_parallel": size}))
        assert done.returncode == 0, done.stderr
        found.append([line for line in damaged.metrics(f"{size}") if "loss" in line])
    whole, divided = found
    assert max(line.get("holes", 0) for line in whole) >= 4
    for one, other in zip(whole, divided, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            exact = key in ("holes", "position", "tokens", "step") or key.startswith("experts/load/")
            assert other[key] == (value if exact or isinstance(value, str) else pytest.approx(value, rel=1e-4)), key


@pytest.mark.campaign
@pytest.mark.timeout(7200)
def test_the_demo_on_two_expert_parallel_ranks(runs: Runs) -> None:
    data = runs.folder / "stdlib"
    command = [sys.executable, "-m", "data_pipeline", "prepare", "configs/data/stdlib.yaml", f"output={data}"]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True)
    sources = {name: f"{data}, domain: {name}" for name in ("code", "docs")}
    done = runs.train(DEMO, *overrides(runs, sources, **{"engine.expert_parallel": 2}), timeout=7000)
    assert done.returncode == 0, done.stderr
    folder = runs.run_folder("moe_demo")
    assert_learns_in_balance(folder, 300, fallen=2.0, imbalance=2.0)
    assert all(line["experts/dead"] == 0 for line in read_metrics(folder)[-30:] if "objective" in line)
    report = [sys.executable, "-m", "pretrain", "report", str(folder)]
    subprocess.run(report, cwd=ROOT, env=environment(), check=True, capture_output=True)
    assert "heatmap" in (folder / "report.html").read_text()
