"""Every code that a finding of a preflight may have: raised here with a cause and a fix, and told in the manual."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from data_pipeline.testing import write_token_dataset
from launch import slurm
from launch.preflight import Code, Finding, cluster, run_checks
from launch.preflight.memory import estimate
from launch.queue import Queued
from pretrain.checkpoint.manifest import record_file, write_manifest
from pretrain.config import load_config
from tests.system.runs import Runs

from .runs_of_tests import SLURM, check, save, slurm_says, write_steps

MANUAL = Path(__file__).parents[2] / "slurm" / "README.md"
CODES: tuple[str, ...] = get_args(Code)


@dataclass
class Scene:
    """The tiny run, to which something is done before its preflight."""

    runs: Runs
    folder: Path
    patch: pytest.MonkeyPatch

    def harmed(self, harm: Callable[[Path], object], *overrides: str) -> list[Finding]:
        """With a shard of its data set harmed."""
        copy = self.folder / "copy"
        shutil.copytree(self.runs.data, copy)
        harm(next(path for path in sorted(copy.rglob("*.tar")) if "heldout" not in path.name))
        return check(self.runs, *(f"data.sources.{name}.path={copy}" for name in "ab"), *overrides)

    def without_heldout(self) -> list[Finding]:
        documents = [[number] * 60 for number in range(4, 300)]
        write_token_dataset(self.folder / "copy", {(name, "train"): documents for name in "ab"}, block_tokens=64)
        return check(self.runs, *(f"data.sources.{name}.path={self.folder}/copy" for name in "ab"))

    def impossible_model(self) -> list[Finding]:
        def refuse(*arguments: object) -> None:
            raise ValueError("no model has this shape")

        self.patch.setattr(run_checks, "count_parameters", refuse)
        return check(self.runs)

    def queued(self) -> list[Finding]:
        self.patch.setattr(slurm, "queued", lambda jobs: {"7": Queued("7", "PENDING", "Priority")})
        return slurm._in_the_queue(self.runs.run_folder("run"))

    def saved(self, *overrides: str, **changes: object) -> list[Finding]:
        """With a checkpoint of step 4, whose state differs in ``changes``."""
        path = save(self.runs)
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps({**state, **changes}))
        write_manifest(path, [record_file(path, path / "state.json")])
        return check(self.runs, *overrides, nodes=(2, 2))

    def damaged(self) -> list[Finding]:
        (save(self.runs) / "state.json").write_text("{}")
        return check(self.runs)

    def second(self) -> list[Finding]:
        place = self.folder / "second" / "run"
        shutil.copytree(save(self.runs), place / "step_000000004")
        return check(self.runs, f"checkpoint.second={{path: {place.parent}}}", "resume=never")

    def memory(self, factor: float) -> list[Finding]:
        need = estimate(load_config(self.runs.folder / "run.yaml"), 320, 1).tensors
        return check(self.runs, gpu_memory=need * factor)

    def disk(self, free: int) -> list[Finding]:
        self.patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        return check(self.runs)

    def inodes(self) -> list[Finding]:
        system = {
            "f_files": 10,
            "f_favail": 3,
            "f_frsize": 1,
            **dict.fromkeys(("f_bavail", "f_blocks", "f_bfree"), 10**12),
        }
        self.patch.setattr(os, "statvfs", lambda path: SimpleNamespace(**system))
        return check(self.runs)

    def forbidden(self) -> list[Finding]:
        self.patch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
        return check(self.runs)

    def stepped(self, seconds: float) -> list[Finding]:
        write_steps(self.runs.run_folder("run"), 10, seconds=seconds)
        return check(self.runs)

    def on_slurm(self, answers: dict[str, str], **options: Any) -> list[Finding]:
        slurm_says(self.patch, answers)
        return check(self.runs, **options)


SCENES: dict[str, Callable[[Scene], list[Finding]]] = {
    "configuration": lambda scene: check(scene.runs, "optimizer.learning_rate=1"),
    "batch": lambda scene: check(scene.runs, nodes=(2, 3)),
    "engine": lambda scene: check(scene.runs, "engine.deepspeed={zero_optimization: {stage: 3}}"),
    "schedule": lambda scene: check(scene.runs, "schedule={name: cosine, warmup_steps: 50}"),
    "model": Scene.impossible_model,
    "run": lambda scene: check(scene.runs, "objective.reweighting.start_step=50"),
    "run.warning": lambda scene: check(scene.runs),
    "run.queued": Scene.queued,
    "data": lambda scene: check(scene.runs),
    "data.missing": lambda scene: check(scene.runs, "data.sources.a.path=/nowhere/data"),
    "data.damaged": lambda scene: scene.harmed(Path.unlink),
    "data.holes": lambda scene: scene.harmed(Path.unlink, "data.on_damage=hole"),
    "data.heldout": Scene.without_heldout,
    "data.tokens": lambda scene: check(scene.runs, "data.sources.a.max_epochs=1", "training.steps=2000"),
    "tokenizer": lambda scene: check(scene.runs, "model.vocab_size=16"),
    "resume": Scene.saved,
    "resume.missing": lambda scene: check(scene.runs, "resume=/nowhere/step_000000001"),
    "resume.damaged": Scene.damaged,
    "resume.incompatible": lambda scene: scene.saved("model.hidden_size=64"),
    "resume.complete": lambda scene: scene.saved("training.steps=4", "schedule={name: constant}"),
    "resume.second": Scene.second,
    "memory": lambda scene: check(scene.runs),
    "memory.tight": lambda scene: scene.memory(1.05),
    "memory.exceeded": lambda scene: scene.memory(0.5),
    "memory.host": lambda scene: check(scene.runs, "checkpoint.asynchronous=true"),
    "disk": lambda scene: check(scene.runs),
    "disk.tight": lambda scene: scene.disk(3 * 40_000 * 16),
    "disk.space": lambda scene: scene.disk(1),
    "disk.inodes": Scene.inodes,
    "disk.permission": Scene.forbidden,
    "time": lambda scene: scene.stepped(0.5),
    "time.unknown": lambda scene: check(scene.runs),
    "time.lead": lambda scene: scene.stepped(200.0),
    "slurm.unreachable": lambda scene: scene.on_slurm({}),
    "slurm.partition": lambda scene: scene.on_slurm(SLURM, partition="gpus"),
    "slurm.time": lambda scene: scene.on_slurm(SLURM, time_limit=7200.0),
    "slurm.nodes": lambda scene: scene.on_slurm(SLURM, partition="cpu", nodes=(4, 4)),
    "slurm.gpus": lambda scene: scene.on_slurm(SLURM, partition="gpu", gpus=True, ranks_per_node=16),
    "slurm.account": lambda scene: scene.on_slurm(SLURM, account="theirs"),
    "versions": lambda scene: check(scene.runs),
    "versions.changed": lambda scene: scene.saved(versions={"torch": "1.0"}),
    "versions.cuda": lambda scene: check(scene.runs, gpus=True),
}


def manual() -> dict[str, set[str]]:
    """The severities of each code, by the table of the manual."""
    rows = re.findall(r"^\| `([a-z.]+)` \| ([a-z, ]+) \|", MANUAL.read_text(), re.MULTILINE)
    return {code: set(severities.split(", ")) for code, severities in rows}


def test_the_manual_tells_every_code() -> None:
    assert sorted(manual()) == sorted(CODES)


@pytest.mark.parametrize("code", CODES)
def test_a_code_has_severity_cause_and_fix(
    code: str, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "have", lambda command: False)
    runs.config("run")
    found = SCENES[code](Scene(runs, tmp_path, monkeypatch))
    raised = [finding for finding in found if finding.code == code]
    assert raised, [finding.code for finding in found]
    for finding in raised:
        assert finding.severity in manual()[code]
        assert finding.cause.strip(), "what was found"
        assert finding.fix.strip() or finding.severity == "info", "what is to be done"


def test_missing_shards_are_an_error_where_the_run_may_not_lose_so_much(runs: Runs, tmp_path: Path) -> None:
    runs.config("run")
    scene = Scene(runs, tmp_path, pytest.MonkeyPatch())
    found = [(each.severity, each.cause) for each in scene.harmed(Path.unlink, "data.on_damage=hole")]
    (cause,) = (cause for severity, cause in found if severity == "error")
    assert re.search(
        r"1 shard is missing or without block index, by which the run loses \d+ sequences .*max_hole_fraction = 0.001",
        cause,
    )
    shutil.rmtree(tmp_path / "copy")
    allowed = scene.harmed(Path.unlink, "data.on_damage=hole", "data.max_hole_fraction=1.0")
    assert "data.holes" in {each.code for each in allowed}
    assert "error" not in {each.severity for each in allowed}


@pytest.mark.parametrize(("cause", "fix"), [("", "Mend it."), ("It is broken.", "")])
def test_no_finding_can_lack_cause_or_fix(cause: str, fix: str) -> None:
    with pytest.raises(ValueError, match="a finding without a cause or a fix"):
        Finding("batch", "warning", cause, fix)
    assert Finding("batch", "info", "It is so.").fix == ""
