"""What the README says runs: every command of the tour, in order, and every YAML block through its schema."""

from __future__ import annotations

import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_pipeline.prepare import PrepareSettings
from data_pipeline.settings import build_settings
from pretrain.config import load_config
from pretrain.model import parameter_shapes
from pretrain.model.linear import kinds
from pretrain.objective import strategies
from pretrain.optimizer import kinds as optimizers

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TOUR = re.findall(r"<!-- tour -->\n```\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tour(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    commands = [line for block in TOUR for line in block.splitlines()]
    assert len(commands) >= 10
    for command in commands:
        ended = subprocess.run(
            command.split(),
            cwd=tmp_path,
            env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
    assert (tmp_path / "runs/tour/report.html").stat().st_size > 100_000


def test_the_yaml_blocks_fit_their_schemas(tmp_path: Path) -> None:
    prepare, run, methods = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    sources = build_settings(PrepareSettings, yaml.safe_load(prepare), "README").sources
    assert set(sources) == {"web", "tars", "books", "notes", "hub"}
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "mine.yaml").write_text(run)
    config = load_config(tmp_path / "mine.yaml")
    assert set(config.data.sources) == {"web", "books"}
    assert config.data.sources["books"].max_epochs == 4
    (tmp_path / "methods.yaml").write_text(methods)
    config = load_config(tmp_path / "methods.yaml")
    config.optimizer.check(config, parameter_shapes(config.model, 4096))
    assert [rule.kind for rule in config.model.linear] == ["lost", "cola"]
    assert (config.optimizer.kind, config.objective.reweighting.strategy.kind) == ("muon", "quadratic")


def test_every_method_is_named() -> None:
    section = README.split("## Methods")[1].split("\n## ")[0]
    for package in (kinds, strategies, optimizers):
        for entry in pkgutil.iter_modules(package.__path__):
            if entry.name not in ("dense", "uniform"):
                assert f"`{entry.name}`" in section


def test_every_test_that_the_architecture_names_exists() -> None:
    rows = [line for line in (ROOT / "docs/architecture.md").read_text().splitlines() if "`tests/" in line]
    assert len(rows) >= 9
    for row in rows:
        folder = Path()
        for name in re.findall(r"`((?:tests/[\w/]+/)?test_[\w*]+\.py)`", row):
            folder = ROOT / Path(name).parent if "/" in name else folder
            assert list(folder.glob(Path(name).name)), f"{name} of {row}"


def test_every_test_of_a_pitfall_exists() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    rows = [line for line in text.splitlines() if "::test_" in line]
    assert len(rows) == 18
    for row in rows:
        path = Path()
        for file, test in re.findall(r"`([\w/.]*)::(test_\w+)`", row):
            path = path if not file else ROOT / (file if "/" in file else f"tests/data_pipeline/{file}")
            assert re.search(rf"^ *def {test}\(", path.read_text(), re.MULTILINE), f"{file}::{test}"


def test_every_named_file_exists() -> None:
    for name in re.findall(r"`((?:configs|tests|docs|benchmarks)/[\w./]+)`", README) + re.findall(
        r"\]\(([^)]+)\)", README
    ):
        assert (ROOT / name).exists(), name
