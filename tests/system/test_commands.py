"""``pretrain evaluate``, ``verify-checkpoint``, ``plan`` and ``report`` on real runs, as a user types them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import kernel
from data_pipeline.errors import UserError
from pretrain.check import check_run
from pretrain.config import load_config
from pretrain.evaluate_run import evaluate_run
from pretrain.plan import make_plan, show_plan
from tests.marks import campaign

from .runs import Runs, environment


def pretrain(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pretrain", *map(str, arguments)]
    env = environment()
    env.pop("DS_ACCELERATOR", None)  # which another test may have set by importing DeepSpeed here
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Runs:
    """A run named ``finished``: 4 steps on one rank, checkpoints and evaluations every 2."""
    runs = Runs(tmp_path_factory.mktemp("finished"), tiny_data)
    assert runs.train(short(runs, "finished"), ranks=1).returncode == 0
    return runs


def short(runs: Runs, name: str, stage: int = 1, precision: str = "fp32") -> Path:
    return runs.config(
        name,
        engine={"zero_stage": stage},
        training={"steps": 4, "precision": precision},
        evaluation={"every_steps": 2},
        checkpoint={"every_steps": 2},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision", "tolerance"),
    [
        (0, "fp32", 1e-6),
        campaign(1, "fp32", 1e-6),
        campaign(2, "fp32", 1e-6),
        (3, "fp32", 1e-6),
        (1, "bf16", 1e-2),
        campaign(3, "bf16", 1e-2),
    ],
)
def test_evaluate_says_what_training_logged(runs: Runs, stage: int, precision: str, tolerance: float) -> None:
    done = runs.train(short(runs, "run", stage, precision))
    assert done.returncode == 0, done.stderr
    logged = {line["step"]: line for line in runs.metrics("run") if "evaluation" in line}
    folder = runs.run_folder("run")
    ended = pretrain("evaluate", folder, "--json")
    assert ended.returncode == 0, ended.stderr
    newest = json.loads(ended.stdout)
    older = evaluate_run(folder, folder / "checkpoints" / "step_000000002", None)
    assert logged[2]["loss"] != pytest.approx(logged[4]["loss"], abs=1e-4)
    for found, step in ((newest, 4), (older, 2)):
        assert found["step"] == step
        assert {key for key in found if key not in ("seconds", "checkpoint")} == set(logged[step])
        assert found.pop("evaluation") == logged[step].pop("evaluation") == "heldout"
        for key, value in logged[step].items():
            assert found[key] == pytest.approx(value, rel=tolerance), key


@pytest.mark.slow
def test_evaluate_for_people_and_bounded(finished: Runs) -> None:
    folder = finished.run_folder("finished")
    ended = pretrain("evaluate", folder, "--sequences", "1")
    assert re.fullmatch(
        r"evaluation heldout at step 4  loss \d\.\d{4}  perplexity \d+\.\d\d  \d\.\d{4} bits/byte  "
        r"\(a \d\.\d{4}, b \d\.\d{4}\)\n",
        ended.stdout,
    )
    assert evaluate_run(folder, None, 1)["tokens"] <= 2 * 32  # one sequence of each source


@pytest.mark.slow
def test_evaluate_refuses(finished: Runs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path} is no run folder: it has no config\.yaml"):
        evaluate_run(tmp_path, None, None)
    config = finished.run_folder("finished") / "config.yaml"
    (tmp_path / "config.yaml").write_text(config.read_text())
    with pytest.raises(UserError, match=r"checkpoints holds no complete checkpoint\. Train first"):
        evaluate_run(tmp_path, None, None)
    with pytest.raises(UserError, match=rf"{tmp_path}/none is no complete checkpoint"):
        evaluate_run(tmp_path, tmp_path / "none", None)
    (tmp_path / "config.yaml").write_text(re.sub(r"(evaluation:\n  every_steps:) \d+", r"\1 null", config.read_text()))
    with pytest.raises(UserError, match=r"evaluation\.every_steps = null"):
        evaluate_run(tmp_path, None, None)


@pytest.mark.slow
def test_verify_checkpoint(finished: Runs) -> None:
    checkpoint = finished.run_folder("finished") / "checkpoints" / "step_000000002"
    good = pretrain("verify-checkpoint", checkpoint)
    assert good.returncode == 0
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file() and path.name != "MANIFEST.json")
    assert good.stdout == (
        f"{checkpoint}: step 2, 5 files, {size:,} bytes, all as they were saved; 21 parameters, whole, "
        "saved by 1 ranks at ZeRO stage 1\n"
    )
    victim = checkpoint / "rank_00000.pt"
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    bad = pretrain("verify-checkpoint", checkpoint)
    victim.write_bytes(content)
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr == (
        f"error: {checkpoint} is damaged: {victim} has other content than when it was saved (SHA-256 differs). "
        "Use another checkpoint, or a copy of this one.\n"
    )
    none = pretrain("verify-checkpoint", checkpoint.parent)
    assert none.returncode == 2
    assert "Give the path of a step_... folder." in none.stderr


@pytest.mark.slow
def test_report_of_a_real_run(finished: Runs) -> None:
    folder = finished.run_folder("finished")
    ended = pretrain("report", folder)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"{folder / 'report.html'}\n"
    page = (folder / "report.html").read_text()
    last = [line for line in finished.metrics("finished") if "objective" in line][-1]
    assert last["step"] == 4
    assert "finished" in page
    assert f"{last['loss']:.4f}" in page


def test_plan_in_figures(runs: Runs) -> None:
    """By hand: a block has 2 x 32 x 32 + 2 x 32 x 16 weights of attention, 3 x 32 x 48 of SwiGLU and 2 x 32 gains."""
    path = runs.config("planned")
    plan = make_plan(path, ["training.micro_batch=1"], ranks=2)
    block = 3072 + 4608
    assert plan["vocab_size"] == 300
    assert plan["non_embedding_parameters"] == 2 * (block + 64) + 32
    assert plan["parameters"] == plan["non_embedding_parameters"] + 2 * 300 * 32
    assert plan["flops_per_token"] == 6 * (2 * block + 300 * 32) + 12 * 2 * 4 * 8 * 32
    assert (plan["steps"], plan["sequences"], plan["tokens"], plan["tokens_per_step"]) == (20, 160, 5120, 256)
    assert plan["accumulation_steps"] == 4
    assert plan["flops"] == plan["flops_per_token"] * 5120
    data = check_run(load_config(path), 2)
    drawn = np.bincount(data.order.locate(0, 160).source).tolist()
    assert [source["drawn"] for source in plan["sources"].values()] == drawn
    assert plan["sources"]["a"] == {
        "sequences": data.sources[0].sequences,
        "drawn": drawn[0],
        "epochs": drawn[0] / data.sources[0].sequences,
    }
    assert [(part["name"], part["parameters"]) for part in plan["parts"]] == [
        ("embedding", 9600),
        ("dense", 2 * block),
        ("norms", 5 * 32),
        ("head", 9600),
    ]
    text = show_plan(plan)
    assert "dense: 14 layers, 15,360 parameters, 9.216e+04 FLOPs a token, 184 kB of optimizer state" in text
    assert "optimizer state 417 kB, 208 kB on a rank; buffers 0 B on each" in text, "12 bytes a parameter"
    assert "a micro-batch with activation_checkpointing none (estimate)" in text
    assert "34,720 parameters, 15,520 outside embedding and head; vocabulary 300" in text
    assert "20 steps of 256 tokens, 5,120 tokens in all; 4 micro-steps a step" in text
    assert f"a: {drawn[0]} of its {data.sources[0].sequences} sequences" in text
    assert f"batches       made by {kernel.describe()}" in text
    stages = "training.batch_ramp=[{steps: 3, global_batch: 2}, {steps: 5, global_batch: 4}]"
    ramp = [
        line
        for line in show_plan(make_plan(path, [stages, "training.micro_batch=1"], 2)).splitlines()
        if line.startswith("ramp")
    ]
    assert ramp == ["ramp          first 3 steps of 2 sequences", "ramp          then 5 steps of 4 sequences"]
    assert not runs.run_folder("planned").exists()


def test_plan_of_a_run_that_stands_somewhere(finished: Runs) -> None:
    """Four steps of eight were taken; with another batch, the rest counts from there."""
    path = finished.config("finished")
    plan = make_plan(path, ["training.steps=6", "training.global_batch=2", "training.micro_batch=2"], ranks=1)
    assert plan["sequences"] == 4 * 8 + 2 * 2
    fresh = ["training.steps=6", "training.global_batch=2", "training.micro_batch=2", "resume=never"]
    assert make_plan(path, fresh, ranks=1)["sequences"] == 12
    for other, told in (("run.seed=77", "the seed was"), ("model.layers=1", "the model or its optimizer")):
        with pytest.raises(UserError, match=rf"step_000000004 can't be resumed: .*{told}"):
            make_plan(path, [other], ranks=1)


def test_plan_rounds_tokens_up_to_whole_steps(runs: Runs) -> None:
    plan = make_plan(runs.config("planned"), ["training.steps=null", "training.tokens=257"], ranks=1)
    assert (plan["steps"], plan["tokens"]) == (2, 512)


@pytest.mark.parametrize(
    ("overrides", "ranks", "told"),
    [
        (
            ["training.global_batch=6"],
            2,
            r"training\.global_batch = 6 is not a multiple of micro_batch 2 x 2 ranks = 4",
        ),
        (["training.micro_batch=1"], 1, r"micro_batch x ranks = 1: every weight would be 1"),
        (["schedule.warmup_steps=21"], 1, r"schedule\.warmup_steps 21 is more than the run's 20 optimizer steps"),
        (["engine.deepspeed={train_batch_size: 4}"], 1, r"engine\.deepspeed\.train_batch_size = 4 contradicts"),
        (["optimizer.kind=muonn"], 1, r"unknown kind 'muonn' of 'optimizer'; did you mean 'muon'\?"),
        (["optimizer.kind=galore"], 1, r"'optimizer\.rank' is missing and has no default"),
        (
            ["optimizer={kind: galore, rank: 17}"],
            1,
            r"rank 17 is more than the smaller side of blocks\.0\.attention\.key",
        ),
        (
            ["optimizer={kind: galore, rank: 4}", "engine.zero_stage=3"],
            2,
            r"galore does not go with engine\.zero_stage 3: the gradient of blocks\.0\.attention\.query\.weight",
        ),
        (["data.sources.b.max_epochs=1", "training.steps=5000"], 1, r"'b'.*max_epochs"),
        (["model.vocab_size=100"], 1, r"model\.vocab_size is 100, but the data's tokenizer has 300"),
    ],
)
def test_plan_refuses_what_would_stop_the_run(runs: Runs, overrides: list[str], ranks: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        make_plan(runs.config("planned"), overrides, ranks)
