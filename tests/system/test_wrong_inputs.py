"""Wrong inputs, each with the message that names what, where and what to do — before any work is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import UserError
from data_pipeline.testing import tiny_tokenizer
from pretrain.config import load_config
from pretrain.data import open_data
from pretrain.monitor import read_attempts
from pretrain.run_folder import lock_run_folder, open_run_folder

from .runs import Runs, environment, write_tiny_data


def refusal(runs: Runs, *overrides: str, **sections: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        open_data(load_config(runs.config("wrong", **sections), overrides))
    return str(caught.value)


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``pretrain train`` in one process, without torchrun: its exit code is the command's own."""
    command = [sys.executable, "-m", "pretrain", "train", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, check=False)


def test_missing_data_set(runs: Runs) -> None:
    message = refusal(runs, "data.sources.a.path=/nowhere/data")
    assert "/nowhere/data" in message
    assert "pretrain-data prepare" in message


def test_missing_domain(runs: Runs) -> None:
    message = refusal(runs, "data.sources.a.domain=c")
    assert "no shard of c/train" in message
    assert "a/train" in message


def test_tokenizer_of_another_data_set(runs: Runs, tmp_path: Path) -> None:
    other = tmp_path / "other.model"
    other.write_bytes(tiny_tokenizer(320).model)
    message = refusal(runs, f"data.tokenizer={other}")
    assert f"{other} is not the tokenizer that data.sources.a ({runs.data}) was made with" in message
    assert "leave data.tokenizer out" in message


def test_sequence_length_that_does_not_divide_a_block(runs: Runs) -> None:
    message = refusal(runs, "data.seq_len=48")
    assert "48" in message
    assert "64" in message


def test_vocabulary_smaller_than_the_tokenizers(runs: Runs) -> None:
    assert "model.vocab_size is 100, but the data's tokenizer has 300 tokens" in refusal(runs, "model.vocab_size=100")


def test_unwritable_run_folder(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = load_config(runs.config("wrong"), [f"run.folder={tmp_path / 'file'}"])
    with pytest.raises(UserError, match=rf"the run folder {tmp_path}/file/wrong can't be written: Not a directory"):
        open_run_folder(config)


def test_a_run_folder_in_use(runs: Runs) -> None:
    """Two runs would write into each other's checkpoints; a lock ends with its process, however that ends."""
    folder = open_run_folder(load_config(runs.config("wrong")))
    lock = lock_run_folder(folder)
    with pytest.raises(
        UserError, match=rf"the run folder {folder} is in use by another run \(process {os.getpid()} on"
    ):
        lock_run_folder(folder)
    os.close(lock)
    os.close(lock_run_folder(folder))


def test_the_command_ends_with_2_and_one_paragraph(runs: Runs) -> None:
    ended = train(str(runs.config("wrong")), "optimizer.learning_rate=1")
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("error: ")
    assert "unknown key 'optimizer.learning_rate' (value 1)" in ended.stderr
    assert not runs.run_folder("wrong").exists()


@pytest.mark.slow
def test_every_rank_agrees_and_the_reason_is_recorded(runs: Runs) -> None:
    """Under torchrun the message comes once, and attempts.jsonl has the code that torchrun does not pass on."""
    ended = runs.train(runs.config("wrong", training={"steps": 20, "global_batch": 6, "micro_batch": 2}))
    assert ended.returncode != 0
    assert ended.stderr.count("training.global_batch = 6 is not a multiple of micro_batch 2 x 2 ranks = 4") == 1
    attempt = read_attempts(runs.run_folder("wrong"))[-1]
    assert (attempt.reason, attempt.exit_code, attempt.last_step) == ("user_error", 2, 0)
    assert "use one of these numbers of ranks: 1, 3" in attempt.message


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit(runs: Runs, tmp_path: Path) -> None:
    """Another model, other data, another order, another precision, a damaged or missing checkpoint: all told apart."""
    config = str(runs.config("run", training={"steps": 4, "global_batch": 8, "micro_batch": 2, "precision": "fp32"}))
    assert train(config).returncode == 0
    checkpoint = runs.run_folder("run") / "checkpoints" / "step_000000004"
    for override, parts in {
        "model.layers=3": ["the model or its optimizer differs (layers: 2 in the checkpoint, 3 now)"],
        "run.seed=5": ["the order of the data differs", "seed"],
        "data.sources.b.weight=0.7": ["the order of the data differs", "`data.phases` with `start: "],
        "data.seq_len=16": ["the order of the data differs", "had 411 sequences"],
        "training.precision=bf16": ["precision: 'fp32' in the checkpoint, 'bf16' now", "model.weights_from="],
    }.items():
        ended = train(config, override, "training.steps=8")
        assert ended.returncode == 2, ended.stderr
        assert f"{checkpoint} can't be resumed" in ended.stderr
        for part in parts:
            assert part in ended.stderr
    other = tmp_path / "other"
    write_tiny_data(other, seed=9)
    ended = train(config, f"data.sources.a.path={other}", "training.steps=8")
    assert ended.returncode == 2
    assert "can't be resumed" in ended.stderr

    elsewhere = str(runs.config("elsewhere"))
    missing = train(elsewhere, f"resume={tmp_path / 'none'}")
    assert missing.returncode == 2
    assert "no complete checkpoint" in missing.stderr
    forked = train(elsewhere, f"resume={checkpoint}", "training.steps=6")
    assert forked.returncode == 0, forked.stderr
    assert [line["step"] for line in runs.metrics("elsewhere") if "objective" in line] == [5, 6]

    victim = next((checkpoint / "deepspeed").glob("*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    damaged = train(config, "training.steps=8")
    assert damaged.returncode == 2
    assert f"{victim} has other content than when it was saved" in damaged.stderr
    assert train(config, "training.steps=8", "resume=never").returncode == 0
    assert (runs.run_folder("run") / "before_attempt_9" / "metrics.jsonl").exists()
