"""The study of balance batches: its runs, and what it reads out of the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import load_config
from studies import headers
from studies.balancing import DOMAINS, MEASURES, NONE, SIZES, Size, Way, chosen, difference, measure, report, runs
from studies.common.runs import BASE

SIZE = Size(300, 3, (1, 4, 32), (0.01, 0.1))
EFFECTS = {1: 0.3, 4: 0.1, 32: -0.1, 0: 0.0}


def results() -> list[dict[str, Any]]:
    """Losses apart by known effects of the balance batch, which coefficient 0.1 does not have; seeds differ a lot."""
    found = []
    for run in runs(SIZE):
        labels = dict(run.labels)
        effect = EFFECTS[labels["batch"]] if labels["coefficient"] != 0.1 else 0.0
        spread = 0.001 * labels["seed"] if labels["kind"] != "none" else 0.0
        line = {f"domain_loss/{domain}": 5.0 + labels["seed"] + effect + spread for domain in DOMAINS}
        routing = dict.fromkeys(MEASURES, 0.25) | {"specialization": labels["batch"] / 100 + 0.001 * labels["seed"]}
        found.append({**labels, "evaluations": [line], "heldout_loss": 1.0, "experts": routing, "commit": "c"})
    return found


def test_differences_are_taken_seed_by_seed() -> None:
    found = results()
    whole, small = Way("loss", 0.01, 32), Way("loss", 0.01, 1)
    assert difference(found, whole, NONE).mean == pytest.approx(-0.098)
    assert difference(found, whole, small) == pytest.approx((-0.4, 0.0), abs=1e-12)
    assert measure(found, whole, "specialization").mean == pytest.approx(0.322)
    assert difference(found, whole, small, ["docs"]).mean == pytest.approx(-0.4)


def test_the_report_says_what_the_global_batch_gives() -> None:
    text, plots = report(results(), SIZE)
    told = text.partition("- coefficient 0.01: ")[2].partition("\n")[0]
    assert told.startswith("the global batch is better than with 1 (-0.400 ± 0.000), better than with 4 (-0.200")
    assert told.endswith("specialization 0.012 (1), 0.042 (4), 0.322 (32);")
    # a difference of exactly nothing for all seeds is an interval around 0
    assert "- coefficient 0.1: the global batch is not told apart from 1 (0.000 ± 0.000), not told apart from 4" in text
    assert "| loss, 0.01 | 1 | **0.302 ± 0.002** |" in text
    assert "| none |  | 7.000 ± 2.484 |" in text
    assert "| 0.25 ± 0.00 | 0.25 ± 0.00 | 0.2 ± 0.0 | 0.322 ± 0.002 |" in text
    assert [[list(curve.x) for curve in plot.curves] for plot in plots] == [[[1, 4, 32]] * 2] * 3
    assert list(plots[2].curves[0].y) == pytest.approx([0.012, 0.042, 0.322])


def test_one_seed_tells_nothing_apart_and_says_so() -> None:
    text, _ = report([each for each in results() if each["seed"] == 1], SIZE)
    assert "one seed, so that there is no interval" in text
    assert "the global batch is not told apart from 1 (-0.400), not told apart from 4 (-0.200)" in text
    assert "**" not in text


def test_a_run_that_diverged_is_worse() -> None:
    found = results()
    del chosen(found, Way("loss", 0.01, 32))[0]["heldout_loss"]
    assert difference(found, Way("loss", 0.01, 32), NONE).mean == float("inf")


@pytest.mark.parametrize("name", SIZES)
def test_every_run_of_the_study_is_a_configuration(name: str) -> None:
    size = SIZES[name]
    assert len({run.name for run in runs(size)}) == len(runs(size)) == size.seeds * len(size.ways)
    for run in [run for run in runs(size) if run.labels["seed"] == 2]:
        given = [f"{key}={str(value).replace('None', 'null')}" for key, value in run.overrides.items()]
        config = load_config(BASE, given)
        assert sum(source.weight for source in config.data.sources.values()) == pytest.approx(1.0)
        assert (config.run.seed, config.training.global_batch) == (2, size.batch)  # all ways see the same batches
        balancing, batch = config.objective.balancing, run.labels["batch"]
        assert len(balancing.losses) == (run.labels["kind"] == "loss")
        assert (balancing.bias is not None) == (run.labels["kind"] == "bias")
        if balancing.losses:
            (loss,) = balancing.losses
            assert loss.coefficient == run.labels["coefficient"]
            tokens_of = {"sequence": 1, "micro_batch": config.training.micro_batch, "global_batch": size.batch}
            assert tokens_of[loss.model_dump()["level"]] == batch
        if not 1 < batch < size.batch:
            assert config.training.micro_batch == size.batch


def test_headers_are_documents_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[Path] = []
    monkeypatch.setattr(headers, "ROOT", tmp_path)
    monkeypatch.setattr(headers, "prepare_data", prepared.append)
    headers.prepare_headers(tmp_path / "made/headers.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "made/headers.jsonl").read_text().splitlines()]
    assert len({line["url"] for line in lines}) == len(lines) > 100
    assert all("namespace" in line["text"] or "#" in line["text"] for line in lines)
    assert prepared == [headers.SETTINGS]
    (tmp_path / "data/studies_headers").mkdir(parents=True)
    (tmp_path / "data/studies_headers/manifest.json").touch()
    headers.prepare_headers(tmp_path / "made/headers.jsonl")
    assert len(prepared) == 1
