"""What the studies share: runs that are known once done, intervals, and the sections of the page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.errors import UserError
from pretrain.config import load_config
from studies.common import Curve, Interval, Plot, Run, Study, command, docs, interval, runs, shown, table, write_plots
from studies.common.runs import BASE, DATA, outcome
from tests.system.runs import Runs, write_tiny_data


def test_intervals_are_students() -> None:
    """Against the table of the t distribution: 12.706 for two values, 2.776 for five."""
    assert interval([1.0, 3.0]) == pytest.approx(Interval(2.0, 12.706 * math.sqrt(2) / math.sqrt(2)), rel=1e-4)
    of_five = interval([2.0, 4.0, 4.0, 5.0, 5.0])
    assert of_five == pytest.approx((4.0, 2.7764 * math.sqrt(6 / 4) / math.sqrt(5)), rel=1e-4)
    assert (of_five.low, of_five.high) == (4.0 - of_five.half, 4.0 + of_five.half)
    assert interval([1.0, 2.0, 3.0], 0.5).half < interval([1.0, 2.0, 3.0]).half
    assert math.isnan(interval([1.0]).half)
    assert shown(Interval(1.234, 0.056), 2) == "1.23 ± 0.06"
    assert shown(interval([1.5]), 1) == "1.5"


def test_a_section_replaces_its_earlier_self_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "studies.md"
    docs.put_section("one", "## One\n\nfirst", "python -m studies.one", page=page)
    docs.put_section("two", "## Two", "python -m studies.two", {"bbb", "aaa"}, page)
    other = page.read_text().partition("<!-- two: begin -->")[2]
    docs.put_section("one", "## One\n\nsecond \\1", "python -m studies.one", page=page)
    content = page.read_text()
    assert content.startswith("# Studies")
    assert "first" not in content
    assert (
        content.count("second \\1") == content.count("<!-- one: begin -->") == content.count("<!-- one: end -->") == 1
    )
    assert content.partition("<!-- two: begin -->")[2] == other
    assert "`python -m studies.one`, commit " in content
    assert "`python -m studies.two`, commit aaa, bbb; " in content


def test_tables_and_plots(tmp_path: Path) -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    page = tmp_path / "plots.html"
    curves = [Curve("with <b>", [1, 2], [3.0, 4.0], [0.1, 0.2]), Curve("without", [1, 2], [3.0, 4.0], dash="dot")]
    write_plots(page, [Plot("title", "x", "y", curves, log_x=True)] * 2)
    content = page.read_text()
    assert content.count("Plotly.newPlot(") == 2
    assert '"array":[0.1,0.2]' in content.replace(" ", "")
    assert "<script src=" not in content


def test_the_configurations_of_the_studies_build() -> None:
    data = yaml.safe_load(DATA.read_text())
    assert load_config(BASE).data.sources["code"].path == data["output"]
    assert data["tokenizer"]["train"]["vocab_size"] == runs.VOCABULARY


def test_outcome_of_a_run_that_diverged(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": float(step), "objective": 0.0, "step_seconds": 0.5} for step in range(1, 41)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done, diverged = outcome(tmp_path, 40), outcome(tmp_path, 41)
    assert done["train_loss"] == pytest.approx((37 + 38 + 39 + 40) / 4)
    assert done["curve"] == pytest.approx([2 * part + 1.5 for part in range(20)])
    assert done["seconds"] == 20.0
    assert diverged.keys() == done.keys() - {"train_loss"}
    assert done["shares"] == done["experts"] == {}


def test_the_weight_of_a_source_is_its_mean_over_the_steps_that_weigh(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"step": 1, "loss": 1.0, "objective": 1.0, "step_seconds": 1.0}]
    lines += [{**lines[0], "step": step, "weights/share/a": 0.1 * step, "weights/ess": 0.9} for step in (2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert outcome(tmp_path, 3)["shares"] == {"a": pytest.approx(0.25)}


def test_routing_is_the_mean_of_the_last_tenth_over_all_blocks(tmp_path: Path) -> None:
    lines = [
        {"step": step, "loss": 1.0, "objective": 1.0, "step_seconds": 1.0, "experts/dead": step, "experts/dead/1": 9}
        for step in range(1, 21)
    ]
    lines[-1] |= {"experts/load/1": [0.5, 0.5], "experts/load_cv": 0.25}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert outcome(tmp_path, 20)["experts"] == {"dead": 19.5, "load_cv": 0.25}


def test_the_command_of_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[Any] = []
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "put_section", lambda *given: written.append(given))
    monkeypatch.setattr(Study, "results", lambda study: [{**run.labels, "commit": "abc"} for run in study.runs[:1]])
    monkeypatch.setattr(Study, "do", lambda study, at_once: [{"at_once": at_once, "commit": "new"}])

    def start(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["studies.tiny", *arguments])
        sizes = {"default": 2, "short": 1, "large": 9}
        runs_of = {size: [Run({"seed": seed}, {}) for seed in range(size)] for size in sizes.values()}
        command.study_command(
            "tiny",
            "A study.",
            sizes,
            lambda size, do: (do(runs_of[size]), "Missing."),
            lambda found, size: (f"## {size}: {found}\n", []),
        )
        return capsys.readouterr().out

    assert start("--short", "--report").startswith("## 1: [{'seed': 0, 'commit': 'abc'}]\n\nMissing.\n")
    assert (tmp_path / "runs/studies/tiny_short.html").exists()
    assert not written
    assert "'at_once': 3" in start("--at-once", "3")
    start("--large", "--report")
    assert [given[0] for given in written] == ["tiny", "tiny_large"]
    assert [given[2:] for given in written] == [
        ("python -m studies.tiny", {"new"}), ("python -m studies.tiny --large", {"abc"}),
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        start("--short", "--large")


@pytest.mark.slow
def test_a_run_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_data(tmp_path / "data")
    base = Runs(tmp_path, tmp_path / "data").config("base", training={"steps": 4}, evaluation={"every_steps": 2})
    monkeypatch.setattr(runs, "BASE", base)
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runs, "ROOT", tmp_path)

    def study(*rates: float) -> Study:
        return Study("tiny", [Run({"lr": rate}, {"optimizer.lr": rate, "model.mup": None}) for rate in rates])

    first = study(1e-3, 1e30).do(2)
    assert [line["lr"] for line in first] == [1e-3, 1e30]
    assert [line["step"] for line in first[0]["evaluations"]] == [2, 4]
    assert first[0]["heldout_loss"] == first[0]["evaluations"][-1]["loss"]
    assert len(first[0]["curve"]) == 4
    assert "heldout_loss" not in first[1]
    written = (tmp_path / "results/tiny.jsonl").read_text()
    assert not list((tmp_path / "runs/studies/tiny").iterdir())
    assert study(1e30, 1e-3).results() == first[::-1]
    assert study(1e-3, 1e30).do(2) == first
    assert (tmp_path / "results/tiny.jsonl").read_text() == written
    assert [line["lr"] for line in study(1e-3, 2e-3).do(1)] == [1e-3, 2e-3]
    assert len((tmp_path / "results/tiny.jsonl").read_text().splitlines()) == 3
    with pytest.raises(UserError, match="learning_rte"):
        Study("tiny", [Run({}, {"optimizer.learning_rte": 1.0})]).do(1)
