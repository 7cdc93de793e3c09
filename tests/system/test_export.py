"""``pretrain export`` of a real run, and a run that starts with what was exported, as a user types them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from data_pipeline.errors import EXIT_DONE, EXIT_USER_ERROR
from pretrain.monitor import read_attempts, read_metrics

from .runs import Runs, environment

COLA = {"linear": [{"kind": "cola", "rank": 6, "modules": ["feed_forward.*"]}], "qk_norm": True}
STILL = ["optimizer.lr=1e-30", "optimizer.weight_decay=0.0", "schedule.warmup_steps=0"]
"""An update that moves no weight by as much as its last bit."""


def pretrain(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pretrain", *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200, check=False)


def heldout(run: Path) -> list[Any]:
    return [line["loss"] for line in read_metrics(run) if "evaluation" in line]


@pytest.mark.slow
def test_export_then_start_with_it(runs: Runs, tmp_path: Path) -> None:
    first = runs.config("first", model=COLA, engine={"zero_stage": 2})
    assert runs.train(first, "training.steps=6").returncode == EXIT_DONE
    told = pretrain("export", runs.run_folder("first"), tmp_path / "out", "--json", "--max-shard-size", "20KB")
    assert told.returncode == EXIT_DONE, told.stderr
    written = json.loads(told.stdout)
    assert written["architecture"] == "HeadraceQwen3ForCausalLM"
    assert (written["custom_layers"], written["merged_layers"], written["dtype"]) == (6, 0, "fp32")
    assert written["checkpoint"].endswith("step_000000006")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model(torch.tensor([[5, 6]])).logits.shape == (1, 2, 300)
    for_people = pretrain("export", runs.run_folder("first"), tmp_path / "bf16", "--dtype", "bf16")
    assert f"{written['parameters']:,} parameters, {written['bytes'] // 2:,} bytes in bf16" in for_people.stdout

    second = runs.config(
        "second", model={**COLA, "weights_from": str(tmp_path / "out")}, engine={"zero_stage": 3}, run={"seed": 5}
    )
    ended = runs.train(second, "training.steps=2", *STILL)
    assert ended.returncode == EXIT_DONE, ended.stderr
    assert f"a new run of 2 steps, with the weights of {tmp_path / 'out'}" in ended.stdout
    assert heldout(runs.run_folder("second")) == pytest.approx(heldout(runs.run_folder("first"))[-1:], rel=1e-6)
    (attempt,) = read_attempts(runs.run_folder("second"))
    assert attempt.initial_weights is not None
    assert attempt.initial_weights["path"] == str(tmp_path / "out")
    assert len(attempt.initial_weights["sha256"]) == 64

    assert pretrain("export", runs.run_folder("second"), tmp_path / "again").returncode == EXIT_DONE
    one, two = (
        {name: value for file in (tmp_path / each).glob("*.safetensors") for name, value in load_file(file).items()}
        for each in ("out", "again")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(two[name], value) for name, value in one.items())

    shutil.rmtree(tmp_path / "out")  # a resumed run does not read it again
    resumed = runs.train(second, "training.steps=4", *STILL)
    assert resumed.returncode == EXIT_DONE, resumed.stderr
    assert read_attempts(runs.run_folder("second"))[-1].initial_weights is None
    other = runs.train(second, "training.steps=6", f"model.weights_from={tmp_path / 'bf16'}")
    assert other.returncode != EXIT_DONE
    assert "weights_from:" in other.stderr


def test_wrong_folders_end_with_one_paragraph(runs: Runs, tmp_path: Path) -> None:
    """Before any work, with the code of a user's mistake, by `plan` too."""
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    for path, reason in ((tmp_path, "holds no weights"), (tmp_path / "half", "model_type is None")):
        config = runs.config("wrong", model={"weights_from": str(path)})
        for command in ("plan", "train"):
            ended = pretrain(command, config)
            assert ended.returncode == EXIT_USER_ERROR, ended.stderr
            assert reason in ended.stderr
            assert ended.stderr.startswith("error: ")
            assert len(ended.stderr.strip().splitlines()) == 1
    for arguments, reason in (
        ([tmp_path, tmp_path / "out"], "is no complete checkpoint"),
        ([tmp_path / "nowhere", tmp_path / "out"], "is no complete checkpoint"),
    ):
        ended = pretrain("export", *arguments)
        assert ended.returncode == EXIT_USER_ERROR
        assert reason in ended.stderr
        assert not (tmp_path / "out").exists()
