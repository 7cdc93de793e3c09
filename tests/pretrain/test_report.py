"""The report page as text: what it says, and that it says it for every folder a run can leave behind."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from data_pipeline.errors import UserError
from pretrain.monitor import WEIGHT_BINS, AttemptsLog, MetricsLog, weight_histogram
from pretrain.report import write_report
from pretrain.report.figures import Figure, make_figures
from pretrain.report.page import render
from pretrain.report.plot import SMOOTHED_FROM
from pretrain.report.run import read_run
from pretrain.report.series import smooth, sum_columns, thin
from pretrain.report.summary import attempt_rows, heldout_rows, incident_rows, incidents, state, tiles, versions

from .report_example import TOTAL_STEPS, make_run


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "run")


def write_lines(folder: Path, *lines: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    log = MetricsLog(folder, 0)
    for line in lines:
        log.write(line)
    return folder


def start(folder: Path, first_step: int = 1) -> tuple[AttemptsLog, int]:
    log = AttemptsLog(folder)
    number = log.start(hosts=["a", "b"], world_size=16, versions={}, first_step=first_step, resumed_from=None)
    return log, number


def words(page: str) -> str:
    """The text of the page's body without its scripts."""
    body = re.sub(r"<script.*?</script>", "", page[page.index("<body>") :], flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body))


def figure(path: Path, id: str) -> Figure:
    return next(figure for figure in make_figures(read_run(path)) if figure.id == id)


def test_a_long_curve_keeps_its_outliers_at_their_own_steps() -> None:
    steps = list(range(0, 50_000, 5))
    values = [math.sin(step / 3000) for step in steps]
    values[7777], values[1234] = 9.0, -9.0
    thin_steps, thin_values = thin(steps, values, points=100)
    assert len(thin_steps) <= 100
    assert thin_steps == sorted(set(thin_steps))
    assert all(values[step // 5] == value for step, value in zip(thin_steps, thin_values, strict=True))
    assert {(7777 * 5, 9.0), (1234 * 5, -9.0), (0, values[0]), (steps[-1], values[-1])} <= set(
        zip(thin_steps, thin_values, strict=True)
    )
    assert thin(steps[:100], values[:100], points=100) == (steps[:100], values[:100])


def test_a_long_curve_keeps_a_stretch_of_nan_as_a_gap() -> None:
    values = [1.0] * 400 + [math.nan] * 200 + [1.0] * 400
    _, thinned = thin(range(1000), values, points=50)
    assert any(math.isnan(value) for value in thinned)


def test_smoothing_is_the_weighted_mean_of_what_was_before() -> None:
    values = [4.0, math.nan, 1.0, 2.0]
    decay = 0.5 ** (1 / 3)
    expected = [4.0, 4.0, (4 * decay + 1) / (decay + 1), (4 * decay**2 + decay + 2) / (decay**2 + decay + 1)]
    assert smooth(values, half_life=3) == pytest.approx(expected, rel=1e-14)
    assert math.isnan(smooth([math.nan, 1.0], 3)[0])


def test_heat_map_columns_add_up_neighbours_and_meet_halfway() -> None:
    steps, counts = [10, 20, 30, 50], [[1, 0], [2, 1], [0, 4], [1, 1]]
    assert sum_columns(steps, counts, columns=2) == ([10 - 20 / 3, 25.0, 50 + 20 / 3], [[3, 1], [1, 5]])
    assert sum_columns([7], [[3, 4]]) == ([6.5, 7.5], [[3, 4]])


def test_every_figure_is_valid_plotly(example: Path) -> None:
    """graph_objects checks every key and value; the colours' names stand for CSS variables and are put aside."""
    drawn = make_figures(read_run(example))
    assert [figure.id for figure in drawn] == [
        "loss", "heldout", "domains", "learning_rate", "grad_norm", "objective", "weights", "ess", "weight_shares",
        "loss_range", "throughput", "data_wait",
    ]  # fmt: skip
    for figure in drawn:
        text = re.sub(r'"@[a-z0-9-]+"', '"#123456"', json.dumps({"data": figure.data, "layout": figure.layout}))
        go.Figure(json.loads(text))


def test_every_named_colour_is_in_both_themes(example: Path) -> None:
    style = (Path(sys.modules["pretrain.report"].__file__ or "").parent / "templates/page.css").read_text()
    light, dark = style.split("prefers-color-scheme: dark")[0], style.split("prefers-color-scheme: dark")[1]
    figures = json.dumps([[figure.data, figure.layout] for figure in make_figures(read_run(example))])
    names = set(re.findall(r'"@([a-z0-9-]+)"', figures))
    assert {"series-1", "heat-high", "alarm", "mark"} <= names
    assert all(f"--{name}:" in light and f"--{name}:" in dark for name in names)


def test_the_page_says_what_happened(example: Path) -> None:
    path = write_report(example)
    assert path == example / "report.html"
    assert not list(example.glob(".*"))
    page = path.read_text()
    text = words(page)
    assert "finished 20" in text
    assert f"step {TOTAL_STEPS} / {TOTAL_STEPS} 100.0%" in text
    assert "stopped (SIGTERM): saved step 80" in text
    assert "killed (no stop was recorded)" in text
    assert "learning rate &lt;zero&gt;; rank 1" in text
    assert "skipped / holes 1 / 0" in text
    assert "strategy: linupper" in text

    run = read_run(example)
    rows = attempt_rows(run)
    assert [row[4].text for row in rows] == ["1 to 80", "81 to ?", "121 to 240"]
    assert [row[7].text for row in rows] == ["0", "10", "–"]
    assert [name for name, _ in versions(run)] == ["Attempts 1 to 3"]
    last = run.evaluations[-1]
    assert [[cell.text for cell in row][1:3] for row in heldout_rows(run)] == [
        ["all", f"{last['loss']:.4f}"],
        ["code", f"{last['domain_loss/code']:.4f}"],
        ["docs", f"{last['domain_loss/docs']:.4f}"],
    ]
    assert heldout_rows(run)[0][2].exact == repr(last["loss"])


def test_the_loss_is_drawn_raw_smoothed_and_held_out_with_marks_at_resumes(example: Path) -> None:
    run = read_run(example)
    loss = figure(example, "loss")
    raw, smoothed, heldout = loss.data
    assert raw["x"] == list(range(1, TOTAL_STEPS + 1))
    assert raw["y"] == [line["loss"] for line in run.steps]
    assert smoothed["y"] == smooth(raw["y"], 5)
    assert (heldout["x"], heldout["y"]) == (
        [40, 80, 120, 160, 200, 240],
        [line["loss"] for line in run.evaluations],
    )
    marks = [(mark["x0"], mark["line"]["dash"]) for mark in loss.layout["shapes"]]
    assert marks == [(80, "dash"), (120, "dash"), (150, "dot")]


def test_a_long_measured_curve_is_smoothed_over_a_faint_raw_one(tmp_path: Path) -> None:
    lines = [{"step": step, "grad_norm": 1.0 + step % 7, "learning_rate": 1.0 / step} for step in range(1, 501)]
    folder = write_lines(tmp_path / "long", *lines)
    raw, smoothed = figure(folder, "grad_norm").data
    assert (raw["line"]["color"], smoothed["line"]["color"]) == ("@faint-1", "@series-1")
    assert raw["y"] == [line["grad_norm"] for line in lines]
    assert smoothed["y"] == smooth(raw["y"], 10)
    assert len(figure(folder, "learning_rate").data) == 1
    assert len(figure(write_lines(tmp_path / "short", *lines[:499]), "grad_norm").data) == 1


def test_a_short_run_has_no_ticks_between_steps(tmp_path: Path) -> None:
    few = figure(write_lines(tmp_path / "few", {"step": 9, "loss": 1.0}), "loss").layout["xaxis"]
    more = figure(write_lines(tmp_path / "more", {"step": 10, "loss": 1.0}), "loss").layout["xaxis"]
    assert (few["dtick"], few["range"], "dtick" in more) == (1, [-0.5, 9.5], False)


def test_the_heat_map_holds_the_share_of_every_weight(tmp_path: Path) -> None:
    folder = write_lines(
        tmp_path / "run",
        {"step": 1, "weights/histogram": weight_histogram([1.0] * 4)},
        {"step": 2, "weights/histogram": weight_histogram([0.25, 0.25, 1.0, 2.5])},
        {"step": 3, "weights/histogram": [5, 6]},  # the bins of another version are not drawn
    )
    heat = figure(folder, "weights").data[0]
    assert heat["x"] == [0.5, 1.5, 2.5]
    assert len(heat["y"]) == len(heat["z"]) + 1
    shares = {
        round(2 ** ((low + high) / 2), 3): row
        for low, high, row in zip(heat["y"], heat["y"][1:], heat["z"], strict=False)
        if any(row)
    }
    assert shares == {0.25: [None, 50.0], 1.0: [100.0, 25.0], round(2**1.25, 3): [None, 25.0]}
    names = [row[0] for row in heat["customdata"]]
    assert f"{WEIGHT_BINS[24]:.4g} to {WEIGHT_BINS[25]:.4g}" in names


def test_weight_by_domain_stands_beside_what_uniform_weights_would_give(tmp_path: Path) -> None:
    names = {"domain_loss/code": 3.0, "domain_loss/docs": 3.0}
    shares = {"weights/share/code": 0.75, "weights/uniform_share/code": 0.5, "weights/share/docs": 0.25}
    folder = write_lines(tmp_path / "run", {"step": 1, **names, **shares}, {"step": 2, **names})
    drawn = {trace["name"]: trace for trace in figure(folder, "weight_shares").data}
    assert set(drawn) == {"code", "code, uniform", "docs"}
    assert (drawn["code"]["y"], drawn["code, uniform"]["y"], drawn["docs"]["x"]) == ([75.0], [50.0], [1])
    assert drawn["code"]["line"]["color"] == drawn["code, uniform"]["line"]["color"]
    assert (drawn["code"]["line"]["dash"], drawn["code, uniform"]["line"]["dash"]) == ("solid", "dot")


def test_smoothed_shares_say_so(tmp_path: Path) -> None:
    share = {"domain_loss/code": 3.0, "weights/share/code": 0.75, "weights/uniform_share/code": 0.5}
    for lines, smoothed in ((2, False), (SMOOTHED_FROM, True)):
        folder = write_lines(tmp_path / str(lines), *({"step": step + 1, **share} for step in range(lines)))
        note = next(each.note for each in make_figures(read_run(folder)) if each.id == "weight_shares")
        assert note == f"Dotted: with uniform weights.{' Smoothed as above.' if smoothed else ''}"


def test_loss_range_temperature_scoring_and_dropped_samples_are_shown(tmp_path: Path) -> None:
    numbers = {"weights/loss_min": 1.0, "weights/loss_max": 5.0, "weights/temperature": 2.0, "weights/dropped": 0}
    times = {"weights/scoring_seconds": 0.5, "step_seconds": 2.0}
    last = {**numbers, "weights/loss_max": 4.5, "weights/temperature": 0.4, "weights/dropped": 3}
    folder = write_lines(tmp_path / "run", {"step": 1, **numbers, **times}, {"step": 2, **last})
    assert [trace["y"] for trace in figure(folder, "loss_range").data] == [[5.0, 4.5], [1.0, 1.0]]
    assert figure(folder, "temperature").data[0]["y"] == [2.0, 0.4]
    assert figure(folder, "scoring").data[0]["y"] == [25.0]
    assert "dropped 3 sequences without a finite loss" in words(write_report(folder).read_text())
    assert not [drawn for drawn in make_figures(read_run(folder)) if drawn.section == "others"]
    steady = write_lines(tmp_path / "steady", {"step": 1, **numbers}, {"step": 2, **numbers})
    assert "temperature" not in {drawn.id for drawn in make_figures(read_run(steady))}


def test_any_other_number_of_a_step_line_has_its_own_plot(tmp_path: Path) -> None:
    folder = write_lines(tmp_path / "run", {"step": 1, "z_loss": 0.5, "experts/0/load": 0.25, "experts/0/drop": 0.0})
    figures = {figure.title: figure for figure in make_figures(read_run(folder))}
    assert list(figures) == ["experts/0", "z_loss"]
    assert [trace["name"] for trace in figures["experts/0"].data] == ["experts/0/drop", "experts/0/load"]


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"step": 1, "loss": 5.0}],
        [{"step": 1, "loss": math.nan, "grad_norm": math.inf, "learning_rate": None}],
        [{"evaluation": "heldout", "step": 0, "loss": 5.0}],
        [{"evaluation": "heldout", "step": 0}],
        [{"event": "bad_block", "step": 0}],
        [{"step": 5, "loss": 1.0, "step_seconds": 0.0, "data_wait_seconds": 0.0}],
        [{"step": 5, "weights/histogram": [0] * (len(WEIGHT_BINS) + 1)}],
    ],
)
def test_a_run_with_little_in_it_has_a_report(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    folder = write_lines(tmp_path / "run", *lines)
    assert "no attempt recorded" in words(write_report(folder).read_text())
    start(folder)
    (folder / "config.yaml").write_text("run:\n  name: little\n")
    text = words(write_report(folder).read_text())
    assert "little running or killed last sign of life" in text
    assert "no stop recorded: running or killed" in text


def test_a_folder_with_only_a_configuration_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("training: {tokens: 1001, global_batch: 10}\ndata: {seq_len: 10}\n")
    assert read_run(tmp_path).total_steps == 11
    text = words(write_report(tmp_path).read_text())
    assert "step 0 / 11 0.0%" in text
    assert "No metric line has been written yet" in text


@pytest.mark.parametrize(
    ("reason", "signal", "kind", "label"),
    [
        ("done", None, "good", "finished"),
        ("stopped", "SIGUSR1", "paused", "stopped by SIGUSR1"),
        ("crash", None, "bad", "crashed"),
        ("non_finite", None, "bad", "stopped: not finite"),
        ("unstable", None, "bad", "stopped: losses too high"),
        ("rolled_back", None, "paused", "went back to a checkpoint"),
        ("user_error", None, "bad", "stopped: configuration or data"),
    ],
)
def test_the_state_is_the_last_attempts(tmp_path: Path, reason: Any, signal: str | None, kind: str, label: str) -> None:
    start(tmp_path)
    log, number = start(tmp_path)
    log.stop(number, last_step=1, reason=reason, exit_code=1, signal=signal)
    shown = state(read_run(tmp_path), now=0)
    assert (shown.kind, shown.label) == (kind, label)


def test_a_graceful_stop_that_is_not_resumed_from_loses_steps_too(tmp_path: Path) -> None:
    log, number = start(tmp_path)
    log.stop(number, last_step=57, reason="crash", exit_code=1)
    start(tmp_path, first_step=51)
    run = read_run(tmp_path)
    assert [run.lost_steps(attempt) for attempt in run.attempts] == [7, None]


def test_an_attempt_that_did_no_step_neither_loses_nor_resumes(tmp_path: Path) -> None:
    """Killed at 90; one start cuts the metrics back to 80 and fails before a step, one is refused; then it goes on."""
    start(tmp_path)
    log, number = start(tmp_path)
    log.stop(number, last_step=0, reason="user_error", exit_code=2, message="the data set is gone")
    log = AttemptsLog(tmp_path)
    how: dict[str, Any] = {"hosts": ["a"], "world_size": 1, "versions": {}, "first_step": 81}
    how["resumed_from"] = "step_000000080"
    number = log.start(**how, lost_steps=10)
    log.stop(number, last_step=80, reason="crash", exit_code=1, message="no memory")
    assert state(read_run(tmp_path), now=0).detail.endswith("UTC: no memory")
    run = read_run(tmp_path)
    assert [run.lost_steps(attempt) for attempt in run.attempts] == [None, None, None]
    log.start(**how)
    run = read_run(tmp_path)
    assert [run.lost_steps(attempt) for attempt in run.attempts] == [10, 0, 0, None]
    assert [(step, attempt.number) for step, attempt in run.resumes] == [(80, 4)]
    assert [row[4].text for row in attempt_rows(run)] == ["1 to ?", "none", "none", "81 to ?"]
    began = ["a fresh start", "ended before its first step", "step_000000080", "step_000000080"]
    assert [row[5].text for row in attempt_rows(run)] == began


def test_the_headline_has_the_figures_of_the_last_line_and_the_medians(tmp_path: Path) -> None:
    step = {"tokens": 2_500_000, "position": 1000, "step_seconds": 2.0, "data_wait_seconds": 0.01, "loss": 3.25}
    folder = write_lines(
        tmp_path / "run",
        {**step, "step": 1, "tokens_per_second": 1000.0, "mfu": 0.1},
        {**step, "step": 2, "tokens_per_second": 3000.0, "mfu": 0.5},
        {**step, "step": 3, "tokens_per_second": 2000.0, "mfu": 0.4, "skipped": 1, "holes": 2},
    )
    shown = {tile.label: (tile.value, tile.detail) for tile in tiles(read_run(folder))}
    assert shown == {
        "step": ("3", ""),
        "tokens": ("2.5 M", "1,000 sequences"),
        "training loss": ("3.2500", "nats per token, last line"),
        "tokens per second": ("2 k", "median; MFU 40.0%"),
        "data wait": ("0.50%", "of the step time"),
        "skipped / holes": ("1 / 2", "steps / sequences"),
    }


def test_a_loss_that_is_no_likelihood_has_its_own_unit_and_ranks(tmp_path: Path) -> None:
    evaluation = {"evaluation": "heldout", "step": 2, "loss": 4.5, "accuracy": 0.25, "reciprocal_rank": 0.5}
    folder = write_lines(
        tmp_path / "run",
        {"step": 1, "loss": 9.0, "objective": 8.0, "domain_loss/a": 9.0},
        {"step": 2, "loss": 8.0, "objective": 8.0, "domain_loss/a": 8.0},
        {**evaluation, "domain_loss/a": 4.5, "domain_accuracy/a": 0.25},
    )
    for given in ("{kind: spherical_z, a: 0.1}", "spherical_z"):
        (folder / "config.yaml").write_text(f"objective: {{loss: {given}}}\n")
        run = read_run(folder)
        units = {each.id: each.layout["yaxis"]["title"]["text"] for each in make_figures(run) if each.id != "ranks"}
        assert units == {
            "loss": "spherical_z per token",
            "heldout": "spherical_z per token",
            "domains": "spherical_z per token",
            "objective": "spherical_z",
        }
    (ranks,) = (each for each in make_figures(run) if each.id == "ranks")
    assert [(trace["name"], list(trace["y"])) for trace in ranks.data] == [
        ("share ranked first", [0.25]),
        ("mean of 1 / rank", [0.5]),
    ]
    shown = {tile.label: (tile.value, tile.detail) for tile in tiles(run)}
    assert shown["training loss"] == ("8.0000", "spherical_z per token, last line")
    assert shown["heldout loss"] == ("4.5000", "accuracy 25.00%")
    page = words(write_report(folder).read_text())
    assert "loss, spherical_z per token" in page
    assert "nats" not in page
    (folder / "config.yaml").write_text("objective: {loss: {kind: cross_entropy}}\n")
    assert read_run(folder).loss_unit == "nats"


def test_only_the_newest_incidents_are_listed_and_the_page_says_so(tmp_path: Path) -> None:
    folder = write_lines(tmp_path / "run", *({"event": "hole", "step": step} for step in range(1, 301)))
    rows = incident_rows(incidents(read_run(folder)))
    assert (len(rows), rows[0][0].text, rows[-1][0].text) == (200, "101", "300")
    assert "Incidents, the last 200 of 300" in words(write_report(folder).read_text())


def test_damage_is_listed_once_a_shard(tmp_path: Path) -> None:
    """A shard is met by many steps, in many blocks; the holes of its row are those of all its lines."""
    places = [f"shard 00000{shard} of source 'web', block {block} at byte 640: checksum" for shard, block in BLOCKS]
    places.append("shard 000000 of source 'web', block 9 at byte 700: missing")
    lines = [
        {"event": "damage", "step": 10 * step + number, "message": place, "new_holes": step, "time": 1e9 + step}
        for step in (1, 2, 3)
        for number, place in enumerate(places)
    ]
    once = {
        "event": "damage",
        "step": 12,
        "message": "holes of the run that /a is of",
        "holes": 1200,
    }  # of an older version
    other = {"event": "data_change", "step": 25, "message": "accepted: seed"}
    single = {"event": "damage", "step": 29, "message": places[0].replace("web", "books"), "new_holes": 1}
    folder = write_lines(
        tmp_path / "run", *sorted([*lines, once, other, single], key=lambda line: int(str(line["step"])))
    )
    rows = [[cell.text for cell in row] for row in incident_rows(incidents(read_run(folder)))]
    of_two = "shard 000000 of source 'web', 2 blocks, the first met 3 at byte 640: checksum; 12 sequences in 6 steps"
    assert rows == [
        ["12", "–", "damage", "holes of the run that /a is of; 1,200 sequences"],
        ["25", "–", "data change", "accepted: seed"],
        ["29", "–", "damage", "shard 000000 of source 'books', block 3 at byte 640: checksum; 1 sequence"],
        ["10 to 31", "2001-09-09 01:46:43", "damage", of_two],
        *(
            [
                f"{10 + number} to {30 + number}",
                "2001-09-09 01:46:43",
                "damage",
                f"{places[number]}; 6 sequences in 3 steps",
            ]
            for number in (2, 3)
        ),
    ]
    assert "of 6" not in words(write_report(folder).read_text())


BLOCKS = [(0, 3), (0, 4), (1, 3)]


def test_whatever_the_run_says_is_escaped(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    folder = tmp_path / "run"
    write_lines(
        folder,
        {"step": 1, "loss": 1.0, f"domain_loss/{evil}": 1.0, f"{evil}/x": 1.0},
        {"event": evil, "step": 1, "message": evil, "detail": evil},
        {"evaluation": evil, "step": 1, "loss": 1.0, f"domain_loss/{evil}": 1.0},
    )
    (folder / "config.yaml").write_text(f"run:\n  name: {json.dumps(evil)}\n")
    log = AttemptsLog(folder)
    log.start(hosts=[evil], world_size=1, versions={evil: evil}, first_step=1, resumed_from=evil)
    log.stop(1, last_step=1, reason="crash", exit_code=1, message=evil)
    page = render(read_run(folder), now=0)
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert page.count("<script") == page.count("</script") == 3
    assert make_figures(read_run(folder))[1].data[0]["name"].startswith(f"{evil}: ".replace("<", "&lt;")[:5])


def test_a_wrong_folder_and_damaged_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder: it holds none of config\.yaml.*Give the folder of one"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("run: [")
    with pytest.raises(UserError, match=r"config\.yaml is not valid YAML"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("run: {}")
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(UserError, match=r"line 1: has no whole-numbered 'step'"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html can't be written: Is a directory"):
        write_report(tmp_path)


def test_the_report_imports_no_torch() -> None:
    program = "import sys, pretrain.report; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
