"""The report page in a real browser: every plot draws, nothing complains, nothing leaves the machine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.monitor import MetricsLog, weight_histogram
from pretrain.report import write_report

from .chromium import Chromium, find_chromium
from .report_example import make_run
from .test_report_experts import step_line

PROGRAM = find_chromium()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium on this machine (apt-get install chromium)")

DRAWN = """
Object.fromEntries([...document.querySelectorAll(".plot")].map((plot) => [plot.id, {
  lines: [...plot.querySelectorAll(".scatterlayer .js-line")].filter((e) => e.getAttribute("d").length > 10).length,
  dots: plot.querySelectorAll(".scatterlayer .point").length,
  heat: [...plot.querySelectorAll(".heatmaplayer image")].filter((e) => e.getAttribute("href").length > 100).length,
  width: plot.querySelector("svg.main-svg").getBoundingClientRect().width,
  unit: plot.querySelector(".ytitle")?.textContent ?? "",
}]))
"""
RANGES = "[...document.querySelectorAll('.plot')].map((plot) => plot._fullLayout.xaxis.range.map(Number))"
READY = "document.documentElement.dataset.plots"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    assert PROGRAM is not None
    chromium = Chromium(PROGRAM, tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(make_run(tmp_path_factory.mktemp("report") / "run"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_every_plot_draws_and_nothing_overflows(browser: Chromium, page: Path, width: int, scheme: str) -> None:
    browser.show(page, width, scheme)
    assert browser.wait_for(READY) == "12"
    plots = browser.evaluate(DRAWN)
    curves = {
        f"plot-{name}": 1 for name in ("learning_rate", "grad_norm", "objective", "ess", "throughput", "data_wait")
    }
    by_domain = {"plot-heldout": 2, "plot-domains": 2, "plot-weight_shares": 4}
    expected = {"plot-loss": 3, "plot-weights": 0, "plot-loss_range": 2, **by_domain, **curves}
    assert {name: plot["lines"] for name, plot in plots.items()} == expected
    assert {name: plot["dots"] for name, plot in plots.items() if plot["dots"]} == {"plot-loss": 6, "plot-heldout": 12}
    assert [name for name, plot in plots.items() if plot["heat"]] == ["plot-weights"]
    assert all(0 < plot["width"] < width and plot["unit"] for plot in plots.values())
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    background, colour = browser.evaluate(
        "[getComputedStyle(document.body).backgroundColor, document.querySelector('#plot-ess .js-line').style.stroke]"
    )
    light = scheme == "light"
    assert background == ("rgb(246, 246, 244)" if light else "rgb(19, 21, 24)")
    assert colour == ("rgb(37, 99, 176)" if light else "rgb(125, 177, 240)")
    assert browser.problems == []


def test_the_theme_follows_the_system_while_the_page_is_open(browser: Chromium, page: Path) -> None:
    browser.show(page, 1280, "light")
    browser.wait_for(READY)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    stroke = "document.querySelector('#plot-ess .js-line').style.stroke"
    browser.wait_for(f"{stroke} === 'rgb(125, 177, 240)'")
    assert browser.problems == []


def test_all_plots_follow_a_zoom_and_a_double_click_goes_back(browser: Chromium, page: Path) -> None:
    browser.show(page, 1280)
    browser.wait_for(READY)
    whole = browser.evaluate(RANGES)
    assert all(shown == whole[0] for shown in whole)
    left, top, width, height = browser.evaluate(
        "(({x, y, width, height}) => [x, y, width, height])"
        "(document.querySelector('#plot-loss .nsewdrag').getBoundingClientRect())"
    )

    def mouse(kind: str, along: float, **how: object) -> None:
        where = {"x": left + along * width, "y": top + height / 2}
        browser.call("Input.dispatchMouseEvent", type=kind, **where, **how)

    mouse("mouseMoved", 0.4)
    mouse("mousePressed", 0.4, button="left", clickCount=1)
    for along in (0.45, 0.5, 0.6):
        mouse("mouseMoved", along, button="left", buttons=1)
    mouse("mouseReleased", 0.6, button="left", clickCount=1)
    start, stop = whole[0]
    zoomed = [start + share * (stop - start) for share in (0.4, 0.6)]
    browser.wait_for(f"{RANGES}.every(([low]) => Math.abs(low - {zoomed[0]}) < 1)")
    assert browser.evaluate(RANGES) == [pytest.approx(zoomed, abs=1)] * len(whole)
    for count in (1, 2):
        mouse("mousePressed", 0.5, button="left", clickCount=count)
        mouse("mouseReleased", 0.5, button="left", clickCount=count)
    browser.wait_for(f"{RANGES}.every(([low]) => low === {start})")
    assert browser.evaluate(RANGES) == whole
    assert browser.problems == []


def test_hovering_shows_the_exact_value(browser: Chromium, page: Path) -> None:
    lines = [json.loads(line) for line in (page.parent / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "learning_rate" in line}
    browser.show(page, 1280)
    browser.wait_for(READY)
    x, y = browser.evaluate(
        "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
        "(document.querySelector('#plot-loss .nsewdrag').getBoundingClientRect())"
    )
    text = ""
    for shift in range(40):  # the first movements after a page has been drawn may be swallowed
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + shift % 2, y=y)
        time.sleep(0.1)
        if text := browser.evaluate("document.querySelector('#plot-loss .hoverlayer').textContent"):
            break
    step = int(text.partition("train")[0])
    assert f"train, every line: {float(f'{losses[step]:.15g}')!r}" in text


def test_the_page_prints_in_light_on_a_white_page(browser: Chromium, page: Path) -> None:
    browser.show(page, 1280, "dark")
    browser.wait_for(READY)
    assert browser.pdf().startswith(b"%PDF")
    sheets = browser.evaluate(
        """new Promise((resolve) => {
          dispatchEvent(new Event("beforeprint"));
          const width = (plot) => plot.querySelector("svg.main-svg").getBoundingClientRect().width;
          const printed = [...document.querySelectorAll(".plot")].map(width);
          const stroke = document.querySelector("#plot-ess .js-line").style.stroke;
          dispatchEvent(new Event("afterprint"));
          setTimeout(() => resolve([printed, stroke, width(document.getElementById("plot-ess"))]), 500);
        })"""
    )
    assert sheets == [[660] * 12, "rgb(37, 99, 176)", pytest.approx(593, abs=20)]
    assert browser.problems == []


def test_a_run_of_one_step_draws(browser: Chromium, tmp_path: Path) -> None:
    line = {"step": 1, "loss": 5.5, "grad_norm": 1.0, "mfu": 0.5, "weights/histogram": weight_histogram([1.0, 0.3])}
    MetricsLog(tmp_path, 0).write(line)
    browser.show(write_report(tmp_path), 1280)
    assert browser.wait_for(READY) == "4"
    plots = browser.evaluate(DRAWN)
    assert {name: (plot["dots"], plot["heat"]) for name, plot in plots.items()} == {
        "plot-loss": (1, 0),
        "plot-grad_norm": (1, 0),
        "plot-weights": (0, 1),
        "plot-mfu": (1, 0),
    }
    assert browser.problems == []


def test_maps_of_experts_draw_and_keep_their_axis_when_the_steps_are_zoomed(browser: Chromium, tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 51):
        log.write(step_line(step, {0: [0.75, 0.25, 0.0], 1: [0.5, 0.25, 0.25]}, {"code": [0.5, 0.5, 0.0]}))
    browser.show(write_report(tmp_path), 400, "dark")
    browser.wait_for(READY)
    plots = browser.evaluate(DRAWN)
    kinds = ("load_0", "domains_0", "load_1", "domains_1", "imbalance_by_block", "specialization_by_block")
    assert {name for name, plot in plots.items() if plot["heat"]} == {f"plot-experts_{kind}" for kind in (
        *kinds, "entropy_by_block",
    )}  # fmt: skip
    assert browser.evaluate("document.documentElement.scrollWidth") == 400
    ids = "['loss', 'experts_load_0', 'experts_domains_0']"
    axes = f"{ids}.map((id) => document.getElementById('plot-' + id)._fullLayout.xaxis.range)"
    before = browser.evaluate(axes)
    browser.evaluate("Plotly.relayout('plot-loss', {'xaxis.range': [10, 20]}).then(() => null)")
    browser.wait_for(f"{axes}[1][0] === 10")
    assert browser.evaluate(axes) == [[10, 20], [10, 20], before[2]]
    browser.evaluate("Plotly.relayout('plot-experts_domains_0', {'xaxis.range': [0, 1]}).then(() => null)")
    assert browser.evaluate(axes)[0] == [10, 20]
    assert browser.problems == []


def test_names_with_markup_are_text(browser: Chromium, tmp_path: Path) -> None:
    evil = "<b>bold</b><img src=x onerror=alert(1)></script><script>window.evil = 1</script>"
    (tmp_path / "config.yaml").write_text(f"run:\n  name: {json.dumps(evil)}\n")
    log = MetricsLog(tmp_path, 0)
    log.write({"step": 1, "loss": 1.0, f"domain_loss/{evil}": 2.0, "domain_loss/@series-1": 1.0})
    log.write({"event": evil, "step": 1, "message": evil})
    browser.show(write_report(tmp_path), 400)
    assert browser.wait_for(READY) == "2"
    assert browser.evaluate("document.querySelector('h1').textContent") == evil
    assert browser.evaluate("document.title").startswith(evil)
    legend = browser.evaluate("[...document.querySelectorAll('#plot-domains .legendtext')].map((e) => e.textContent)")
    assert legend == [evil, "@series-1"]
    assert browser.evaluate("[window.evil === undefined, document.images.length]") == [True, 0]
    assert browser.evaluate("document.documentElement.scrollWidth") == 400
    assert browser.problems == []


def test_the_page_can_not_reach_a_network(browser: Chromium, page: Path) -> None:
    """The page's own policy refuses what a library might try: the request never leaves."""
    browser.show(page, 1280)
    browser.wait_for(READY)
    answer = browser.evaluate("fetch('https://example.invalid/x').then(() => 'sent', (error) => error.name)")
    assert answer == "TypeError"
    refused = [problem for problem in browser.problems if "Content Security Policy" in problem]
    assert refused, browser.problems
    browser.problems.clear()
