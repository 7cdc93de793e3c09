"""The report of a run with experts: what its plots hold, for few experts and for very many."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from pretrain.report import experts, write_report
from pretrain.report.figures import Figure, make_figures
from pretrain.report.run import read_run
from pretrain.report.series import mean_columns

from .test_report import words, write_lines


def step_line(step: int, blocks: dict[int, list[float]], sources: dict[str, list[float]]) -> dict[str, Any]:
    """A metric line with the loads of ``blocks``, and in each of them those of ``sources``."""
    line: dict[str, Any] = {
        "step": step, "loss": 5.0, "experts/imbalance": 1.5, "experts/load_cv": 0.25, "experts/dead": step % 2,
        "experts/entropy": 1.0, "experts/dropped": 0.0, "experts/specialization": 0.5,
        "experts/loss/global_batch": 1.25, "experts/loss/router_z": 4.0,
    }  # fmt: skip
    for block, load in blocks.items():
        line[f"experts/load/{block}"] = load
        line[f"experts/imbalance/{block}"] = max(load) * len(load)
        line |= {f"experts/entropy/{block}": 1.0, f"experts/specialization/{block}": 0.25 * block}
        line |= {f"experts/domain_load/{block}/{name}": of_source for name, of_source in sources.items()}
    return line


def figures(folder: Path) -> dict[str, Figure]:
    return {figure.id.removeprefix("experts_"): figure for figure in make_figures(read_run(folder))}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of four experts over twenty steps; all moves to expert 0 in the last two."""
    even = [0.25] * 4
    end = [1.0, 0.0, 0.0, 0.0]
    lines = []
    for step in range(1, 21):
        load = even if step <= 18 else end
        sources = {"code": load, "<b>": [0.0, 0.5, 0.5, 0.0]} if step != 20 else {"code": load}
        lines.append(step_line(step, {1: load, 3: even}, sources))
    return write_lines(tmp_path_factory.mktemp("experts") / "run", *lines)


def test_columns_are_means_of_neighbours() -> None:
    steps, values = [10, 20, 30, 50], [[1.0, 0.0], [2.0, 1.0], [0.0, 4.0], [1.0, 1.0]]
    assert mean_columns(steps, values, columns=2) == ([10 - 20 / 3, 25.0, 50 + 20 / 3], [[1.5, 0.5], [0.5, 2.5]])


def test_every_number_has_its_plot_and_none_a_second(few: Path) -> None:
    drawn = figures(few)
    assert list(drawn) == [
        "loss", "imbalance", "load_cv", "dead", "entropy", "specialization", "loss_0", "loss_1",
        "imbalance_by_block", "entropy_by_block", "specialization_by_block",
        "load_1", "domains_1", "load_3", "domains_3",
    ]  # fmt: skip
    assert drawn["dead"].data[0]["y"] == [step % 2 for step in range(1, 21)]
    assert drawn["entropy"].note.endswith(f"Undecided between 4 experts it is {math.log(4):.3f}.")
    assert [trace["name"] for trace in drawn["loss_0"].data] == ["global_batch"]
    assert (drawn["loss_1"].title, drawn["loss_1"].data[0]["y"][0]) == ("Router loss router_z", 4.0)
    for figure in drawn.values():
        text = re.sub(r'"@[a-z0-9-]+"', '"#123456"', json.dumps({"data": figure.data, "layout": figure.layout}))
        go.Figure(json.loads(text))


def test_a_load_map_holds_multiples_of_an_even_share(few: Path) -> None:
    heat = figures(few)["load_1"].data[0]
    assert (len(heat["x"]), heat["x"][0], heat["y"]) == (21, 0.5, [0, 1, 2, 3])
    assert heat["z"] == [[1.0] * 18 + [4.0] * 2, *[[1.0] * 18 + [0.0] * 2] * 3]
    # the colour of a balanced expert is the neutral one
    assert dict(heat["colorscale"])[1.0 / heat["zmax"]] == "@heat-even"


def test_sources_by_expert_are_those_of_the_end_beside_all_tokens(few: Path) -> None:
    figure = figures(few)["domains_1"]
    heat = figure.data[0]
    assert heat["y"] == ["all", "&lt;b&gt;", "code"]
    assert heat["z"] == [[4.0, 0.0, 0.0, 0.0], [0.0, 2.0, 2.0, 0.0], [4.0, 0.0, 0.0, 0.0]]
    assert figure.note == "Specialization 0.250. The last tenth of the lines."
    # its axis is the experts: it neither takes the steps' axis nor follows their zoom
    assert (figure.stepwise, figure.layout["xaxis"]["title"]["text"]) == (False, "expert")
    assert "shapes" not in figure.layout


def test_maps_by_block_name_the_blocks_of_the_model(few: Path) -> None:
    figure = figures(few)["imbalance_by_block"]
    assert figure.layout["yaxis"]["ticktext"] == ["1", "3"]
    assert figure.data[0]["z"] == [[1.0] * 18 + [4.0] * 2, [1.0] * 20]
    assert figure.layout["xaxis"]["title"]["text"] == "optimizer step"


def test_the_page_says_how_the_busiest_expert_stands(few: Path) -> None:
    text = words(write_report(few).read_text())
    assert "busiest expert 1.50 × mean 0 dead, specialization 0.500" in text
    assert "Experts, block by block" in text


def test_of_many_blocks_the_worst_have_maps_and_all_one_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "CELLS", 10 * experts.BLOCKS * 16)
    even = [1 / 16] * 16
    bad = [2 / 16, 0.0, *even[2:]]
    blocks = {block: bad if block % 2 else even for block in range(2 * experts.BLOCKS)}
    lines = [step_line(step, blocks, {"code": even}) for step in range(1, 31)]
    drawn = figures(write_lines(tmp_path / "run", *lines))
    maps = [name for name in drawn if re.fullmatch(r"load_\d+", name)]
    assert maps == [f"load_{block}" for block in blocks if block % 2]
    assert {len(row) for name in maps for row in drawn[name].data[0]["z"]} == {10}
    whole = drawn["load_end"]
    assert [row[:3] for row in whole.data[0]["z"]] == [[1.0] * 3, [2.0, 0.0, 1.0]] * experts.BLOCKS
    assert (whole.wide, whole.stepwise) == (True, False)
    assert whole.layout["yaxis"]["ticktext"] == ["0", "2", "4", "6", "8", "10", "12", "14"]


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"experts/load/1": []},
        {"experts/load/1": [0.5, 0.5]},  # of another version, or a model of another shape
        {"experts/load/x": [0.5]},
        {"experts/imbalance/1": None},
        {"experts/domain_load/1/code": [0.5, 0.5]},
    ],
)
def test_lines_that_lack_something_or_do_not_fit_are_no_error(tmp_path: Path, odd: dict[str, Any]) -> None:
    even = [0.25] * 4
    lines = [{"step": 1, **odd}, step_line(2, {1: even}, {"code": even}), {"step": 3, "loss": 5.0}]
    drawn = figures(write_lines(tmp_path / "run", *lines))
    assert drawn["load_1"].data[0]["z"] == [[1.0]] * 4
    assert "imbalance_by_block" not in drawn  # one block is the mean of all
    assert drawn["domains_1"].data[0]["z"] == [[1.0] * 4] * 2
    alone = figures(write_lines(tmp_path / "alone", {"step": 1, "loss": 1.0, **odd}))
    assert ("load_1" in alone) == bool(odd.get("experts/load/1"))


def test_drops_and_the_bias_are_shown_where_there_are_any(tmp_path: Path) -> None:
    line = {**step_line(1, {1: [0.5, 0.5]}, {}), "experts/dropped": 0.125, "experts/bias_range": 0.5}
    drawn = figures(write_lines(tmp_path / "run", line))
    assert (drawn["dropped"].data[0]["y"], drawn["bias_range"].data[0]["y"]) == ([12.5], [0.5])
    assert "domains_1" not in drawn
