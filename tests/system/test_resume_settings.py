"""Resuming with other settings than those that saved: what may change does, what may not is refused."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from data_pipeline.errors import UserError
from data_pipeline.history import read_history
from data_pipeline.when_seen import when_seen
from pretrain.check import check_run
from pretrain.checkpoint import complete_checkpoints
from pretrain.config import load_config
from pretrain.monitor import MetricsLog, read_attempts, read_metrics
from pretrain.run_folder import plain, set_aside, write_config
from pretrain.state import TrainState, end_position
from tests.ranks import run_on_ranks

from .runs import Runs, environment
from .sessions import Ended, kept, meet, read, train_here


def train(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pretrain", "train", *arguments]
    env = {**environment(), **extra}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
def test_optimizer_settings_follow_the_configuration(runs: Runs) -> None:
    """DeepSpeed's checkpoint would bring back the weight decay and betas it was saved with."""
    config = str(runs.config("run"))
    assert train(config, "training.steps=4").returncode == 0
    same = train(config, "run.name=same", f"resume={runs.run_folder('run')}/checkpoints/step_000000004")
    other = train(
        config,
        "run.name=other",
        f"resume={runs.run_folder('run')}/checkpoints/step_000000004",
        "optimizer.weight_decay=0.9",
        "optimizer.betas=[0.5, 0.5]",
    )
    assert (same.returncode, other.returncode) == (0, 0), other.stderr
    assert runs.state_hashes("same", 20) != runs.state_hashes("other", 20)
    layout = train(config, "training.steps=8", "optimizer.decay_norms_and_embeddings=true")
    assert layout.returncode == 2
    assert "optimizer.decay_norms_and_embeddings: False in the checkpoint, True now" in layout.stderr


@pytest.mark.slow
def test_the_state_of_a_projected_optimizer_fits_its_own_settings_alone(runs: Runs) -> None:
    config = str(runs.config("run", optimizer={"kind": "galore", "rank": 8, "gap": 3}))
    assert train(config, "training.steps=4").returncode == 0
    for change, told in (
        ("optimizer.rank=4", "optimizer.rank: 8 in the checkpoint, 4 now"),
        ("optimizer.modules=[attention.*]", "optimizer.modules: ['attention.*', 'feed_forward.*'] in the checkpoint"),
    ):
        refused = train(config, "training.steps=8", change)
        assert refused.returncode == 2
        assert told in refused.stderr
    resumed = train(config, "training.steps=8", "optimizer.gap=2", "optimizer.scale=0.5")
    assert resumed.returncode == 0, resumed.stderr


@pytest.mark.slow
def test_another_global_batch_is_checked_to_its_real_end(runs: Runs) -> None:
    """4 steps of 64 and 56 of 8 consume 704 positions; the smaller product 60 x 8 would have seemed to fit."""
    config = str(runs.config("run", evaluation={"every_steps": None}))
    once = ["data.sources.a.max_epochs=1", "data.sources.b.max_epochs=1"]
    assert train(config, *once, "training.steps=4", "training.global_batch=64").returncode == 0
    refused = train(config, *once, "training.steps=60", "training.global_batch=8")
    assert refused.returncode == 2, refused.stderr
    assert "max_epochs" in refused.stderr
    tokens = train(config, "training.steps=null", "training.tokens=100000", "training.global_batch=8")
    assert tokens.returncode == 2
    assert "training.tokens does not say how many steps are left" in tokens.stderr


def test_the_end_of_a_run_whose_batch_changed(runs: Runs) -> None:
    config = load_config(runs.config("run"), ["training.steps=60"])
    assert end_position(config, TrainState(step=4, position=256)) == 256 + 56 * 8


def test_an_infinite_temperature_survives_the_run_folder(runs: Runs, tmp_path: Path) -> None:
    """The exact off switch of reweighting, written to config.yaml and read again."""
    config = load_config(runs.config("run"), ["objective.reweighting.temperature=.inf"])
    write_config(tmp_path, config, {})
    assert plain(load_config(tmp_path / "config.yaml")) == plain(config)
    assert load_config(tmp_path / "config.yaml").objective.reweighting.temperature == float("inf")


def test_an_evaluation_that_will_be_made_again_is_not_kept(tmp_path: Path) -> None:
    """Saved on a signal before its evaluation, evaluated after the resume, killed before the next save."""
    log = MetricsLog(tmp_path, 0)
    for line in ({"step": 9}, {"step": 10}, {"step": 10, "evaluation": "heldout"}):
        log.write(line)
    MetricsLog(tmp_path, 10, evaluated=True)
    assert len(read_metrics(tmp_path)) == 3
    assert MetricsLog(tmp_path, 10, evaluated=False).superseded == 1
    assert read_metrics(tmp_path) == [{"step": 9}, {"step": 10}]


def test_set_aside_takes_a_free_name(tmp_path: Path) -> None:
    (tmp_path / "before_attempt_3").mkdir()
    (tmp_path / "metrics.jsonl").write_text("")
    assert set_aside(tmp_path, 3) == tmp_path / "before_attempt_3_2"
    assert (tmp_path / "before_attempt_3_2" / "metrics.jsonl").exists()
    assert set_aside(tmp_path, 3) is None


@pytest.mark.slow
def test_never_means_once(runs: Runs) -> None:
    """A launcher that starts the command again by itself must not throw away what the first start did."""
    config = str(runs.config("run"))
    assert train(config, "training.steps=4").returncode == 0
    again = train(config, "training.steps=8", "resume=never", SLURM_RESTART_COUNT="1")
    assert again.returncode == 0, again.stderr
    assert [line["step"] for line in runs.metrics("run") if "objective" in line] == list(range(1, 9))


@pytest.mark.slow
def test_a_lost_rank_ends_the_run_after_the_configured_time(runs: Runs) -> None:
    """DeepSpeed's own process groups would wait 30 minutes for a rank that is stopped."""
    config = runs.config("run", resilience={"collective_timeout_seconds": 5}, training={"steps": 5000})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "pretrain", "train", str(config), "training.global_batch=8", "training.micro_batch=2"]
    command += ["training.precision=fp32", "evaluation.every_steps=null", "checkpoint.every_steps=null"]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step") and "/" in line:
            break
    worker = [child for child in psutil.Process(process.pid).children() if "pretrain" in child.cmdline()][1]
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        _, errors = process.communicate(timeout=90)
    finally:
        process.kill()
        with contextlib.suppress(ProcessLookupError):  # the agent has seen to it when all is well
            os.kill(worker.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert "Timed out waiting 5000ms" in errors


def test_groups_of_one_are_refused(runs: Runs) -> None:
    with pytest.raises(UserError, match=r"strategy = 'linupper' .* training.micro_batch x ranks = 1"):
        check_run(load_config(runs.config("run"), ["training.micro_batch=1"]), 1)


def train_with_a_phase_from_step_5_on(plain_config: Path, phased: Path) -> list[Ended]:
    ranks = meet()
    ended = [train_here(ranks, plain_config)]
    for checkpoint in complete_checkpoints(load_config(plain_config).run_folder / "checkpoints")[1:]:
        shutil.rmtree(checkpoint)
    return [*ended, train_here(ranks, phased), train_here(ranks, phased, "run.name=straight")]


def test_a_later_phase_of_the_mixture_may_be_added(runs: Runs) -> None:
    """From the position of the checkpoint of step 4 on, and another in the midst of step 6."""
    phases = [{"start": 32, "weights": {"a": 1, "b": 3}}, {"start": 45, "weights": {"a": 0, "b": 1}}]
    sections: dict[str, Any] = {"training": {"steps": 8}, "evaluation": {"every_steps": 8}}
    before = runs.config("run", **sections)
    phased = before.with_stem("phased")
    phased.write_text(yaml.safe_dump({"extends": before.name, "data": {"phases": phases}}))
    (ended,) = run_on_ranks(train_with_a_phase_from_step_5_on, 1, before, phased)
    assert [each.code for each in ended] == [0, 0, 0], ended
    resumed, straight = runs.run_folder("run"), runs.run_folder("straight")
    assert read_attempts(resumed)[1].first_step == 5
    assert kept(resumed) == kept(straight)
    assert runs.metrics("run") == runs.metrics("straight")
    rows = read(resumed, 8)
    assert rows == read(straight, 8)
    assert {row.source for step in rows[6:] for row in step} == {"b"}
    assert len(read_history(resumed).stretches) == 2, "the change is recorded from the step on from which it holds"
    document = rows[7][0].documents[0].id
    assert when_seen(resumed, document) == when_seen(straight, document)
