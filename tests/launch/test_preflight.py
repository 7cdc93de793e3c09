"""Each finding of a preflight, once: what is wrong is told by its code, and nothing else is an error."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from launch import queue
from launch.preflight import Finding, cluster, failed, preflight, show
from launch.preflight.cluster import seconds_of
from launch.preflight.memory import estimate
from pretrain.checkpoint.manifest import record_file, write_manifest
from pretrain.checkpoint.second import SecondPlace
from pretrain.config import load_config
from tests.system.runs import Runs

from .runs_of_tests import SLURM, check, codes, request, save, slurm_says, write_steps


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "have", lambda command: False)


LOOSE = "data.sources.a.max_epochs=1"


def test_a_sound_run_has_no_errors_and_says_what_it_will_be(runs: Runs) -> None:
    found = check(runs)
    assert codes(found) == ["run.warning"], show(found)  # groups of two samples are reweighted
    told = show(found)
    assert f"data.sources.a: {runs.data}, " in told
    assert "sequences, identity" in told
    assert "memory" in codes(found, "info")
    assert "further checkpoints of" in told
    assert not runs.run_folder("run").exists(), "a preflight writes nothing"


@pytest.mark.parametrize(
    ("override", "code", "told"),
    [
        ("optimizer.learning_rate=1", "configuration", "unknown key"),
        ("training.global_batch=10", "batch", "global_batch = 10"),
        ("engine.deepspeed={zero_optimization: {stage: 3}}", "engine", "zero_optimization.stage"),
        ("schedule={name: cosine, warmup_steps: 50}", "schedule", "warmup"),
        ("data.sources.a.path=/nowhere/data", "data.missing", "/nowhere/data"),
        ("data.sources.a.domain=c", "data.missing", "no shard of c/train"),
        ("model.vocab_size=16", "tokenizer", "16"),
        ("objective.reweighting.start_step=50", "run", "start_step"),
        (LOOSE, "data.tokens", "a"),
        ("resume=/nowhere/step_000000001", "resume.missing", "/nowhere"),
    ],
)
def test_what_would_stop_the_run_is_an_error(runs: Runs, override: str, code: str, told: str) -> None:
    more = ["training.steps=2000"] if override == LOOSE else []
    found = check(runs, override, *more, nodes=(1, 2))
    assert codes(found, "error") == [code], show(found)
    assert failed(found)
    error = found[0]
    assert told in error.cause
    assert error.fix, "an error says what to do"


def test_every_number_of_nodes_of_a_range_must_divide(runs: Runs) -> None:
    assert codes(check(runs, nodes=(2, 2)), "error") == []
    found = check(runs, nodes=(2, 3))
    assert codes(found, "error") == ["batch"]
    assert "3 ranks" in found[0].cause
    assert codes(check(runs, nodes=(3, 4)), "error") == ["batch"], "and not only the most"


def test_damaged_data_and_missing_heldout_text(runs: Runs, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(runs.data, copy)
    config = runs.config("run", data={"sources": {"a": {"path": str(copy), "max_epochs": None}}, "seq_len": 32})
    train = next(path for path in sorted(copy.rglob("*.tar")) if "heldout" not in str(path))
    content = bytearray(train.read_bytes())
    for at in range(512 + 128, len(content) - 1024, 64):
        content[at] ^= 1
    train.write_bytes(content)
    found = preflight(request(runs, config.stem))
    assert codes(found, "error")[0] == "data.damaged", show(found)
    train.unlink()
    assert codes(preflight(request(runs, config.stem)), "error") == ["data.damaged"]


def test_the_checkpoint_to_go_on_from(runs: Runs) -> None:
    runs.config("run")
    path = save(runs)
    found = check(runs, nodes=(2, 2))
    assert codes(found, "error") == []
    assert "Goes on from" in next(each.cause for each in found if each.code == "resume")
    found = check(runs, "model.hidden_size=64", nodes=(2, 2))
    assert codes(found, "error") == ["resume.incompatible"]
    assert "hidden_size: 32 in the checkpoint, 64 now" in found[0].cause
    assert "resume.complete" in codes(check(runs, "training.steps=4", "schedule={name: constant}", nodes=(2, 2)))
    state = json.loads((path / "state.json").read_text())
    gone_back = {"left_out": [[0, 2]], "skip_ranges": [[0, 2]]}
    (path / "state.json").write_text(json.dumps({**state, **gone_back}))
    write_manifest(path, [record_file(path, path / "state.json")])
    assert codes(check(runs, nodes=(2, 2)), "error") == [], "what the run has left out by itself is no contradiction"
    (path / "state.json").write_text(json.dumps({**state, "versions": {"torch": "1.0"}}))
    write_manifest(path, [record_file(path, path / "state.json")])
    assert "torch 1.0 -> " in show(check(runs, nodes=(2, 2)))
    (path / "state.json").write_text("{}")
    found = check(runs, nodes=(2, 2))
    assert "resume.damaged" in codes(found, "warning")
    assert "Goes on from" not in show(found)


def test_a_newer_checkpoint_in_the_second_place_is_the_one_to_go_on_from(runs: Runs, tmp_path: Path) -> None:
    second = f"checkpoint.second={{path: {tmp_path}/second}}"
    runs.config("run")
    path = save(runs)
    assert "resume.second" not in codes(check(runs, second), "info"), "the second place is empty"
    copy = tmp_path / "second" / "run" / path.name
    shutil.copytree(path, copy)
    found = check(runs, second, nodes=(2, 2))
    assert "resume.second" not in codes(found, "info"), "it has no newer one"
    assert "resume" in codes(found, "info")
    shutil.rmtree(path)
    found = check(runs, second)
    assert (codes(found, "error"), "resume" in codes(found, "info")) == ([], False)
    assert f"The start fetches {copy}, newer than" in show(found)
    found = check(runs, second, "resume=never")
    assert codes(found, "error") == ["resume.second"]
    assert "holds 1 checkpoints of an earlier run" in show(found)


def test_a_second_place_that_does_not_answer_stops_a_run_without_checkpoints(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(self: SecondPlace) -> list[str]:
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(SecondPlace, "complete", silent)
    second = f"checkpoint.second={{path: {tmp_path}/second}}"
    runs.config("run")
    found = check(runs, second, nodes=(2, 2))
    assert codes(found, "error") == ["resume.second"]
    assert "can't be seen: ConnectionError: nobody answers" in show(found)
    save(runs)
    found = check(runs, second, nodes=(2, 2))
    assert (codes(found, "error"), codes(found, "warning").count("resume.second")) == ([], 1)
    assert "Goes on from" in show(found)


def test_memory_against_the_gpus(runs: Runs) -> None:
    config = load_config(runs.config("run"))
    need = estimate(config, 320, 1).tensors
    assert codes(check(runs, gpu_memory=need * 2), "error") == []
    assert codes(check(runs, gpu_memory=need * 0.5), "error") == ["memory.exceeded"]
    assert "memory.tight" in codes(check(runs, gpu_memory=need * 1.05), "warning")


def test_the_disk(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    assert codes(check(runs), "error") == ["disk.space"]
    need = 3 * 40_000 * 16
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(need, 0, need))
    assert "disk.tight" in codes(check(runs), "warning")
    monkeypatch.undo()

    class Full:
        f_files, f_favail, f_bavail, f_blocks, f_bfree, f_frsize = 10, 3, *[10**12] * 3, 1

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    assert codes(check(runs), "error") == ["disk.inodes"]
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert codes(check(runs), "error") == ["disk.permission"]


def test_the_time_of_steps_and_saves(runs: Runs) -> None:
    assert "time.unknown" in codes(check(runs), "info")
    write_steps(runs.run_folder("run"), 10, seconds=0.5)
    found = check(runs, time_limit=3600.0)
    assert "10 steps of 0.50 s are left: 5 s, 1 allocations of 1 h 0 min" in show(found)
    write_steps(runs.run_folder("run"), 10, seconds=200.0)
    found = check(runs)
    assert codes(found, "error") == ["time.lead"]
    assert found[0].fix == "Submit with --signal=B:USR1@860."
    assert codes(check(runs, time_limit=300.0), "error") == ["time.lead"]


def test_the_newest_steps_and_a_save_count(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = runs.run_folder("run")
    write_steps(folder, 50, seconds=1.0)
    older = (folder / "metrics.jsonl").read_text()
    write_steps(folder, 50, seconds=100.0)
    (folder / "metrics.jsonl").write_text(older + (folder / "metrics.jsonl").read_text())
    assert "time.lead" not in codes(check(runs), "error"), "two steps take 200 s of 300 s"
    monkeypatch.setattr(cluster, "save_seconds", lambda config: 150.0)
    assert "may need 350 s" in next(each.cause for each in check(runs) if each.code == "time.lead")


def test_the_partition(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm_says(monkeypatch, SLURM)

    def errors(**options: object) -> list[Finding]:
        return [each for each in check(runs, **options) if each.severity == "error"]

    assert errors(partition="gpu", time_limit=3600.0, account="ours") == []
    assert [each.code for each in errors(partition="gpus")] == ["slurm.partition"]
    assert "cpu, gpu, old" in errors(partition="gpus")[0].fix
    assert [each.code for each in errors(partition="old")] == ["slurm.partition"]
    assert [each.code for each in errors(time_limit=7200.0)] == ["slurm.time"], "of the default partition"
    assert [each.code for each in errors(nodes=(4, 4), partition="cpu")] == ["slurm.nodes"]
    assert errors(nodes=(4, 4), partition="old,gpu") == [], "Slurm takes the one that fits"
    assert [each.code for each in errors(nodes=(4, 4), partition="cpu,old")] == [
        "slurm.nodes", "slurm.partition", "slurm.nodes",
    ]  # fmt: skip
    assert [each.code for each in errors(partition="gpu,gpus")] == ["slurm.partition"]
    assert [each.code for each in errors(partition="gpu", account="theirs")] == ["slurm.account"]
    many = errors(partition="gpu", gpus=True, ranks_per_node=16, nodes=(1, 1))
    assert {each.code for each in many} == {"slurm.gpus", "batch"}
    slurm_says(monkeypatch, {"sinfo": SLURM["sinfo"]})
    assert "slurm.unreachable" in codes(check(runs), "warning"), "which partition is the default is not known"
    slurm_says(monkeypatch, {})
    unreachable = next(each for each in check(runs) if each.code == "slurm.unreachable")
    assert unreachable.severity == "warning"
    assert str(unreachable).endswith(
        "sinfo refuses: no controller. The partition was not checked: see that `sinfo` answers here, then ask again."
    )


def test_times_as_slurm_writes_them() -> None:
    times = {"90": 5400, "1:30": 90, "2:00:00": 7200, "1-0": 86400, "1-12:30": 131400, "2-00:00:10": 172810}
    for text, seconds in times.items():
        assert seconds_of(text) == seconds
    assert seconds_of("infinite") is None
    with pytest.raises(ValueError, match="invalid literal"):
        seconds_of("soon")


def test_a_torch_without_cuda_is_told_where_gpus_are_asked_for(runs: Runs) -> None:
    assert "versions.cuda" in codes(check(runs, gpus=True), "warning")
    assert "versions.cuda" not in codes(check(runs))


def test_slurm_that_is_not_there() -> None:
    with pytest.raises(queue.SlurmError, match="no_such_command is not here"):
        queue.run("no_such_command")
