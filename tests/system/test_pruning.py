"""Pruned runs by the command line: on the way, and lottery tickets over two rounds (arXiv 1912.05671)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.engine.weights import load_weights
from pretrain.monitor import read_attempts

from .runs import Runs

LAST, EARLY = 10, 2


def section(*rules: dict[str, Any], **changes: Any) -> dict[str, Any]:
    shape = {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate_size": 48}
    return {**shape, "linear": [{"kind": "magnitude_pruned", **rule} for rule in rules], **changes}


def checkpoint(runs: Runs, name: str, step: int) -> Path:
    return runs.run_folder(name) / "checkpoints" / f"step_{step:09d}"


def train(runs: Runs, name: str, stage: int, training: dict[str, Any], **sections: dict[str, Any]) -> None:
    done = runs.train(config(runs, name, stage, training, **sections))
    assert done.returncode == 0, done.stderr


def config(runs: Runs, name: str, stage: int, training: dict[str, Any], **sections: dict[str, Any]) -> Path:
    return runs.config(
        name,
        training={"steps": LAST, "global_batch": 8, "micro_batch": 2, "precision": "fp32", **training},
        engine={"zero_stage": stage},
        checkpoint={"every_steps": 2, "keep_last": 10},
        evaluation={"every_steps": 2, "sequences": 4},
        **sections,
    )


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "pretrain", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=240, check=False)


def ticket(runs: Runs, mask_from: Path, sparsity: float) -> dict[str, Any]:
    """The sections of a round: early weights of the dense run, masked by the last weights of another."""
    rule = {"sparsity": sparsity, "scope": "global", "mask_from": str(mask_from)}
    return section(rule, weights_from=str(checkpoint(runs, "dense", EARLY)))


def expected_masks(weights: dict[str, Any], sparsity: float) -> dict[str, np.ndarray]:
    """The largest of what another run has not pruned, all layers of the blocks together, by a plain sort."""
    names = [name for name in weights if name.startswith("blocks.") and name.endswith("weight")]
    names = [name for name in names if weights[name].ndim == 2]
    values = [weights[name].detach().abs().numpy() for name in names]
    for name, value in zip(names, values, strict=True):
        if (mask := weights.get(f"{name[:-6]}mask")) is not None:
            value[~mask.numpy()] = -1.0
    flat = np.concatenate([value.ravel() for value in values])
    kept = np.ones(len(flat), bool)
    kept[np.argsort(flat, kind="stable")[: int(Fraction(str(sparsity)) * len(flat))]] = False
    ends = np.cumsum([value.size for value in values])[:-1]
    parts = zip(names, values, np.split(kept, ends), strict=True)
    return {f"{name[:-6]}mask": part.reshape(value.shape) for name, value, part in parts}


def assert_masks(runs: Runs, name: str, step: int, expected: dict[str, np.ndarray]) -> None:
    weights = load_weights(checkpoint(runs, name, step))
    assert {key for key in weights if key.endswith(".mask")} == expected.keys()
    assert len(expected) == 14
    for key, mask in expected.items():
        assert (weights[key].numpy() == mask).all(), (name, step, key)


@pytest.mark.slow
def test_lottery_tickets_over_two_rounds(runs: Runs) -> None:
    """docs/methods.md's recipe; the second round is killed and goes on without the runs it came from."""
    rewind = {"rewind": True}
    train(runs, "dense", 1, {})
    dense = load_weights(checkpoint(runs, "dense", LAST))
    train(runs, "one", 3, rewind, model=ticket(runs, checkpoint(runs, "dense", LAST), 0.2))
    first = expected_masks(dense, 0.2)
    assert_masks(runs, "one", LAST, first)
    last = load_weights(checkpoint(runs, "one", LAST))
    second_round = ticket(runs, checkpoint(runs, "one", LAST), 0.36)
    train(runs, "two", 2, rewind, model=second_round)
    second = expected_masks(last, 0.36)
    assert_masks(runs, "two", EARLY + 2, second)
    assert all((mask <= first[key]).all() for key, mask in second.items())

    killed = runs.train(config(runs, "again", 2, rewind, model=second_round), fault="step:7")
    assert killed.returncode != 0
    shutil.move(runs.run_folder("dense"), runs.folder / "elsewhere")
    shutil.move(runs.run_folder("one"), runs.folder / "elsewhere, too")
    train(runs, "again", 2, rewind, model=second_round)
    assert runs.state_hashes("again", LAST) == runs.state_hashes("two", LAST)
    assert runs.metrics("again") == runs.metrics("two")
    began, resumed = read_attempts(runs.run_folder("again"))
    assert (began.first_step, resumed.first_step) == (EARLY + 1, 7)
    assert [each["path"] for each in began.masks] == [str(checkpoint(runs, "one", LAST))]
    assert began.initial_weights is not None
    assert began.initial_weights["path"] == str(checkpoint(runs, "dense", EARLY))
    assert not resumed.masks


@pytest.mark.campaign
def test_a_rewound_run_has_the_early_weights_and_the_samples_and_rates_that_followed(runs: Runs) -> None:
    """With nothing pruned it begins where the other run stood; its optimizer is new, and nothing else."""
    train(runs, "dense", 1, {})
    nothing = ticket(runs, checkpoint(runs, "dense", LAST), 0.0)
    train(runs, "rewound", 0, {"rewind": True}, model=nothing)
    lines = {name: runs.metrics(name) for name in ("dense", "rewound")}
    for lines_of in lines.values():
        assert [line["step"] for line in lines_of if "evaluation" not in line][-1] == LAST
    steps = {name: {line["step"]: line for line in found if "evaluation" not in line} for name, found in lines.items()}
    assert list(steps["rewound"]) == list(range(EARLY + 1, LAST + 1))
    for step, line in steps["rewound"].items():
        for key in ("position", "learning_rate", "tokens"):
            assert line[key] == steps["dense"][step][key], (step, key)
    assert steps["rewound"][EARLY + 1]["loss"] == pytest.approx(steps["dense"][EARLY + 1]["loss"], rel=1e-6)
    assert steps["rewound"][LAST]["loss"] != pytest.approx(steps["dense"][LAST]["loss"], rel=1e-6)
    before, after = (
        next(line for line in found if "evaluation" in line and line["step"] == EARLY) for found in lines.values()
    )
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-6)

    gradual = {"begin_step": 1, "end_step": 9, "every_steps": 2}
    early = section({"sparsity": 0.5, "gradual": gradual}, weights_from=str(checkpoint(runs, "dense", EARLY)))
    refused = command("plan", str(config(runs, "early", 1, {"rewind": True}, model=early)))
    assert refused.returncode == 2
    assert "linear.0 (magnitude_pruned): gradual prunes after steps 1 to 9, but the run goes from 2" in refused.stderr
    lacking = config(runs, "early", 1, {}, model=ticket(runs, runs.folder, 0.2))
    assert "is no complete checkpoint" in command("plan", str(lacking)).stderr
    assert command("plan", str(config(runs, "rewound", 1, {"rewind": True}, model=nothing))).returncode == 0


@pytest.mark.slow
def test_a_run_that_prunes_on_the_way_goes_on_to_the_bit(runs: Runs) -> None:
    gradual = {"begin_step": 1, "end_step": 9, "every_steps": 1}
    pruned = section({"sparsity": 0.5, "gradual": gradual}, {"sparsity": 0.7, "gradual": gradual, "scope": "global"})
    pruned["linear"][0]["modules"], pruned["linear"][1]["modules"] = ["attention.*"], ["feed_forward.*"]
    train(runs, "straight", 3, {}, model=pruned)
    killed = runs.train(config(runs, "broken", 3, {}, model=pruned), fault="step:5")
    assert killed.returncode != 0
    train(runs, "broken", 3, {}, model=pruned)
    assert runs.state_hashes("broken", LAST) == runs.state_hashes("straight", LAST)
    assert runs.metrics("broken") == runs.metrics("straight")
    early = load_weights(checkpoint(runs, "straight", 4))["blocks.0.attention.query.mask"]
    # the checkpoint of 4 steps has the mask of the fourth, decided when 3 were done
    assert int((~early).sum()) == int(0.5 * (1 - (1 - 2 / 8) ** 3) * early.numel())
    masks = {key: value for key, value in load_weights(checkpoint(runs, "broken", LAST)).items() if "mask" in key}
    attention = [mask for key, mask in masks.items() if "attention" in key]
    assert all(int((~mask).sum()) == mask.numel() // 2 for mask in attention)
    inner = [mask for key, mask in masks.items() if "attention" not in key]
    assert sum(int((~mask).sum()) for mask in inner) == int(0.7 * sum(mask.numel() for mask in inner))
