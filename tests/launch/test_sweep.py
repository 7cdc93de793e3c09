"""What a sweep's file means, and what happens to members that fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.errors import UserError
from launch import sweep as sweeps
from launch.__main__ import bytes_of, sweep
from launch.preflight import Request, cluster
from launch.slurm import node_range
from launch.sweep_settings import load_sweep
from pretrain.model import count_parameters
from pretrain.monitor import AttemptsLog, Reason
from tests.system.runs import Runs

from .runs_of_tests import write_steps

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


def write(runs: Runs, **content: Any) -> Path:
    runs.config("base")
    path = runs.folder / "grid.yaml"
    head = {"name": "s", "folder": str(runs.folder / "runs"), "base": "base.yaml"}
    path.write_text(yaml.safe_dump({**head, **content}, sort_keys=False))
    return path


def test_a_grid_is_every_combination_of_every_case(runs: Runs) -> None:
    path = write(
        runs,
        grid={"optimizer.lr": [1e-3, 3e-3], "engine.zero_stage": [1, 2]},
        cases=[{"label": "thin", "model.hidden_size": 32}, {"model.hidden_size": 64, "model.layers": 1}],
        overrides=["training.steps=7"],
        exclude=[{"label": "thin", "engine.zero_stage": 2, "optimizer.lr": 3e-3}],
    )
    settings, members = load_sweep(path, ("monitor.log_every=2",))
    assert settings.name == "s"
    assert [member.name for member in members][:2] == ["thin-lr_0.001-zero_stage_1", "thin-lr_0.001-zero_stage_2"]
    assert "thin-lr_0.003-zero_stage_2" not in [member.name for member in members]
    assert [member.name for member in members][-1] == "hidden_size_64-layers_1-lr_0.003-zero_stage_2"
    assert len(members) == 7
    last = members[-1].config
    assert (last.optimizer.lr, last.engine.zero_stage, last.model.hidden_size, last.model.layers) == (3e-3, 2, 64, 1)
    assert (last.training.steps, last.monitor.log_every) == (7, 2)
    assert members[-1].folder == runs.folder / "runs" / "s" / members[-1].name


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({}, "nothing to sweep"),
        ({"grid": {"optimizer.lr": []}}, "grid.optimizer.lr has no values"),
        ({"grid": {"optimizer.lr": [1e-3]}, "cases": [{"optimizer.lr": 1e-4}]}, "both set optimizer.lr"),
        ({"grid": {"optimizer.rate": [1e-3]}}, "member rate_0.001: .*unknown key 'optimizer.rate'"),
        ({"grid": {"optimizer.lr": [1e-3, 1e-3]}}, "two members would be named lr_0.001"),
        ({"grid": {"optimizer.lr": [1e-3]}, "gird": {}}, "did you mean 'grid'"),
        ({"grid": {"optimizer.lr": [1e-3]}, "exclude": [{"optimizer.lr": 1.0}]}, "exclude.0 fits no member"),
        ({"grid": {"optimizer.lr": [1e-3]}, "overrides": ["optimizer.lr=1"]}, "optimizer.lr=1 changes nothing"),
        ({"cases": [{"optimizer.lr": 1e-3}], "overrides": ["optimizer.lr=1"]}, "optimizer.lr=1 changes nothing"),
        ({"grid": {"optimizer.lr": [1e-3]}, "overrides": ["run.name=mine"]}, "run.name=mine changes nothing"),
    ],
)
def test_wrong_files_are_refused(runs: Runs, content: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_sweep(write(runs, **content))


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_every_member_of_a_shipped_sweep_builds(path: Path) -> None:
    _, members = load_sweep(path)
    assert len(members) > 1
    for member in members:
        assert count_parameters(member.config.model, 1000).total > 0  # built on the meta device


def test_the_families_of_optimal_sparsity_have_the_papers_parameters() -> None:
    """algorithms: N = 2 V d + 16 (4 d^2 + 6 d^2 E + d E), active with k for E; here with the norms' (2 L + 1) d."""
    _, members = load_sweep(ROOT / "configs/sweeps/optimal_sparsity.yaml")
    assert len(members) == 3 * (6 * 4 - 1)
    vocabulary, millions = 99_600, {}
    for member in members[::5]:
        width, experts, top_k = (
            member.values[f"model.{key}"] for key in ("hidden_size", "experts.number", "experts.top_k")
        )
        counted = count_parameters(member.config.model, vocabulary)
        rest = 2 * vocabulary * width + 33 * width + 16 * width * experts
        assert counted.total == rest + 16 * width**2 * (4 + 6 * experts)
        assert counted.active == rest + 16 * width**2 * (4 + 6 * top_k)
        millions[member.name] = (counted.total / 1e6, counted.active / 1e6)
    assert members[0].name == "d512-number_8-top_k_2"
    assert millions["d512-number_8-top_k_2"] == pytest.approx((320, 170), rel=0.01), "the released 320M-A170M"


def pretend(monkeypatch: pytest.MonkeyPatch, failing: str = "") -> list[str]:
    """Members that end at once, all but one well; the list of those that were started."""
    started: list[str] = []

    def run(command: list[str], **options: Any) -> Any:
        config = yaml.safe_load(Path(command[-1]).read_text())
        folder = Path(config["run"]["folder"]) / config["run"]["name"]
        started.append(folder.name)
        write_steps(folder, 20)
        log, bad = AttemptsLog(folder), folder.name == failing
        number = log.start(hosts=["h"], world_size=1, versions={}, first_step=1, resumed_from=None)
        reason: Reason = "non_finite" if bad else "done"
        code = int(bad)
        message = "loss nan" if bad else ""
        log.stop(number, last_step=20, reason=reason, exit_code=code, message=message)
        return type("Done", (), {"returncode": code})

    monkeypatch.setattr(sweeps.subprocess, "run", run)
    return started


def test_a_failed_member_is_told_and_run_again_alone(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(runs, grid={"optimizer.lr": [1e-3, 3e-3, 1e-2]})
    request = Request(path, gpus=False)
    opened = sweeps.open_sweep(path, [], request)
    assert isinstance(opened, sweeps.Sweep)
    started = pretend(monkeypatch, failing="lr_0.003")
    assert sweeps.run_locally(opened, 1, 2) == 1
    assert sorted(started) == ["lr_0.001", "lr_0.003", "lr_0.01"]
    rows = sweeps.results(opened)
    assert [row["state"] for row in rows] == ["done", "non_finite", "done"]
    shown = sweeps.show_results(rows)
    assert "| lr_0.001 | 0.001 | done | 20 | 2 |" in shown
    assert "1 of 3 members are not done" in shown
    assert "lr_0.003: attempt 1: non-finite: loss nan" in shown
    started = pretend(monkeypatch)
    assert sweeps.run_locally(opened, 1, 2) == 0
    assert started == ["lr_0.003"]
    assert "all 3 members are done" in sweeps.show_results(sweeps.results(opened))
    longer = sweeps.open_sweep(path, ["training.steps=30"], request)
    assert isinstance(longer, sweeps.Sweep)
    assert longer.open == [0, 1, 2], "a longer run is not done"


def test_a_member_that_can_not_run_stops_the_sweep(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(runs, grid={"data.sources.a.path": ["/nowhere/data"]})
    assert sweeps.open_sweep(path, [], Request(path, gpus=False)) == 2
    assert "data.missing" in capsys.readouterr().err


def test_a_dry_run_on_this_machine_starts_nothing(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does it ask Slurm, or take in silence what only Slurm could do."""
    path = write(runs, grid={"optimizer.lr": [1e-3, 3e-3]})
    started = pretend(monkeypatch)
    asked: list[str] = []
    monkeypatch.setattr(cluster, "have", asked.append)
    sweep(path, dry_run=True, ranks=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" launch ")[1].split("/")[0] for line in lines[1:]] == ["local --ranks 2 "] * 2
    assert started == asked == []
    with pytest.raises(UserError, match=r"--nodes, --time says nothing of a sweep on this machine\. Give --slurm"):
        sweep(path, nodes="2", time="1:00:00")
    with pytest.raises(UserError, match=r"--ranks 2 says nothing of a job array\. Give --gpus-per-node or --ranks-per"):
        sweep(path, on_slurm=True, ranks=2)


def test_what_is_queued_is_not_changed_by_another_look_at_the_sweep(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An array's task reads the configuration of its number when it starts, which may be days after; in between the
    sweep's file changes, is tried, shown or refused."""
    monkeypatch.setattr(sweeps, "take_snapshot", lambda config, folder: folder)
    path, request = write(runs, grid={"optimizer.lr": [1e-3, 3e-3]}), Request(Path("grid.yaml"), gpus=False)
    queued = sweeps.open_sweep(path, [], request)
    assert isinstance(queued, sweeps.Sweep)
    assert sweeps.submit(queued, [], None, request, dry_run=True) is None
    assert str(queued.files[0].parent) in capsys.readouterr().out, "the folder that the tasks read"
    before = [file.read_bytes() for file in queued.files]
    again = sweeps.open_sweep(path, [], request)
    assert isinstance(again, sweeps.Sweep)
    assert again.files == queued.files
    write(runs, grid={"optimizer.lr": [1e-2, 1e-3, 3e-3]})
    changed = sweeps.open_sweep(path, [], request)
    assert isinstance(changed, sweeps.Sweep)
    write(runs, grid={"data.sources.a.path": ["/nowhere/data"]})
    assert sweeps.open_sweep(path, [], request) == 2
    assert [file.read_bytes() for file in queued.files] == before


def test_words_of_the_command_line() -> None:
    assert (bytes_of("80GB"), bytes_of("1.5 tb"), bytes_of("512mb")) == (80e9, 1.5e12, 512e6)
    for wrong in ("80", "GB", "-80GB", "nanGB", "80GB each"):
        with pytest.raises(ValueError, match=wrong):
            bytes_of(wrong)
    with pytest.raises(UserError, match=r"--gpu-memory '80' can't be read\. Give it as 80GB, with its unit"):
        sweep(Path("grid.yaml"), gpu_memory="80")
    assert (node_range("4"), node_range("2-4")) == ((4, 4), (2, 4))
    for wrong in ("0", "4-2", "many", "-3"):
        with pytest.raises(UserError, match="give a number of nodes"):
            node_range(wrong)
