"""The study of reweighting: its runs, the noise, and what it reads out of the results."""

from __future__ import annotations

import base64
import math
from collections import Counter
from typing import Any

import pytest

from data_pipeline.errors import UserError
from pretrain.config import load_config
from studies import noise
from studies.common import marked
from studies.common.runs import BASE, whole_seeds
from studies.reweighting import (
    CLEAN,
    SIZES,
    UNIFORM,
    Size,
    chosen,
    differences,
    reaching,
    report,
    runs,
    shown_steps,
    steps_to_reach,
)

SIZE = Size(150, 3, (0.4, 1.0), ("linupper", "quadratic"), evaluations=3)
EFFECTS = {("linupper", 0.4): -0.1, ("linupper", 1.0): 0.0, ("quadratic", 0.4): 0.2, ("quadratic", 1.0): 0.0}


def results(size: Size) -> list[dict[str, Any]]:
    """Losses that fall on straight lines, apart by known effects on every domain but one; seeds differ a lot."""
    found = []
    for run in runs(size):
        labels = dict(run.labels)
        effect = EFFECTS.get((labels["strategy"], labels.get("r", 0.0)), 0.0)
        spread = 0.001 * labels["seed"] if labels["strategy"] != "uniform" else 0.0
        losses = [5.0 + labels["seed"] - step / 100 + effect + spread for step in (50, 100, 150)]
        lines = [
            {
                "step": step,
                **{f"domain_loss/{domain}": loss for domain in CLEAN},
                "domain_loss/noise": loss - 2 * effect,
            }
            for step, loss in zip((50, 100, 150), losses, strict=True)
        ]
        shares = {} if labels["strategy"] == "uniform" else {"code": 0.5, "docs": 0.25, "noise": 0.25}
        found.append({**labels, "evaluations": lines, "heldout_loss": 1.0, "shares": shares, "commit": "c"})
    return found


def test_the_steps_to_a_loss_lie_on_the_line_between_evaluations() -> None:
    steps, losses = (10, 20, 30), (5.0, 4.0, 3.5)
    assert steps_to_reach(steps, losses, 4.25) == pytest.approx(17.5)
    assert steps_to_reach(steps, losses, 3.5) == 30
    assert steps_to_reach(steps, losses, 6.0) == 10
    assert steps_to_reach(steps, losses, 3.4) is None
    assert steps_to_reach((1, 2, 3), (3.0, 4.0, 2.0), 2.5) == pytest.approx(2.75)
    assert shown_steps([100.0, None, 120.0]) == "2 of 3 seeds"
    assert shown_steps([100.0, 100.0]) == "100 ± 0"


def test_differences_are_taken_seed_by_seed() -> None:
    """The seeds are 1 apart, the effects are 0.1: only pairs can tell."""
    found = results(SIZE)
    better = differences(found, "clean", ("linupper", 0.4), CLEAN)
    assert better.mean == pytest.approx(-0.1 + 0.002)
    assert better.half < 0.003
    assert marked(better) == "**-0.098 ± 0.002**"
    assert marked(differences(found, "clean", ("linupper", 1.0), CLEAN)) == "0.002 ± 0.002"
    assert differences(found, "noise", ("quadratic", 0.4), ["noise"]).mean == pytest.approx(-0.2 + 0.002)
    # a line falls by 0.01 a step: 0.1 less is 10 steps less
    steps = reaching(found, "clean", ("linupper", 0.4))
    assert steps == pytest.approx([150 - 9.9, 150 - 9.8, 150 - 9.7])
    assert reaching(found, "clean", ("quadratic", 0.4)) == [None] * 3
    assert reaching(found, "noise", UNIFORM) == [150.0] * 3


def test_the_report_says_what_is_better_worse_and_not_told_apart() -> None:
    found = results(SIZE)
    text, plots = report(found, SIZE)
    assert (
        "better than uniform: linupper at r = 0.4 (-0.098 ± 0.002); worse: quadratic at r = 0.4 (0.202 ± 0.002); "
        "not told apart from it: linupper at r = 1 (0.002 ± 0.002), quadratic at r = 1 (0.002 ± 0.002)" in text
    )
    assert "| linupper | 0.4 | **-0.098 ± 0.002** | **-0.098 ± 0.002** | **0.102 ± 0.002** | 140 ± 0 | 25 % |" in text
    assert "| uniform |  | 5.500 ± 2.484 | 5.500 ± 2.484 | 150 ± 0 | 40 % (as drawn) |" in text
    assert [len(plot.curves) for plot in plots] == [4, 4]
    assert plots[0].curves[0].y == pytest.approx([-0.098] * 3)


def test_a_run_that_diverged_is_worse_and_reaches_nothing() -> None:
    found = results(SIZE)
    del chosen(found, "clean", ("linupper", 0.4))[1]["heldout_loss"]
    assert differences(found, "clean", ("linupper", 0.4), CLEAN).mean == math.inf
    text, _ = report(found, SIZE)
    assert "better than uniform: none" in text


def test_only_seeds_with_all_runs_are_reported() -> None:
    found = results(SIZE)
    known, missing = whole_seeds(runs(SIZE), found)
    assert (known, missing) == (found, "")
    known, missing = whole_seeds(runs(SIZE), found[:-1])
    assert {each["seed"] for each in known} == {1, 2}
    assert missing == "Missing, and in no figure: seed 3 (9 of 10 runs are known)."
    with pytest.raises(UserError, match="--report"):
        whole_seeds(runs(SIZE), found[:9])


@pytest.mark.parametrize("name", SIZES)
def test_every_run_of_the_study_is_a_configuration(name: str) -> None:
    size = SIZES[name]
    assert len({run.name for run in runs(size)}) == len(runs(size)) == 2 * size.seeds * len(size.methods)
    orders = set()
    for run in [run for run in runs(size) if run.labels["seed"] == 2]:
        given = [f"{key}={str(value).replace('None', 'null')}" for key, value in run.overrides.items()]
        config = load_config(BASE, given)
        weighting = config.objective.reweighting
        assert weighting.strategy.kind == run.labels["strategy"]
        assert weighting.temperature == run.labels.get("r", weighting.temperature)
        assert weighting.start_step == (0 if run.labels["strategy"] == "uniform" else size.warmup)
        weights = {source: settings.weight for source, settings in config.data.sources.items()}
        assert sum(weights.values()) == pytest.approx(1.0)
        assert weights.get("noise", 0.0) == (0.2 if run.labels["data"] == "noise" else 0.0)
        assert weights["code"] / weights["docs"] == pytest.approx(1.5)
        assert config.total_steps % (config.evaluation.every_steps or 0) == 0
        orders.add((run.labels["data"], config.run.seed, config.training.global_batch, config.training.micro_batch))
    assert len(orders) == 2  # all methods see the same batches


def test_noise_is_of_four_kinds_and_follows_from_the_seed() -> None:
    texts = ["the quick brown fox jumps over the lazy dog " * 10] * 8
    made = list(noise.documents(iter(texts), 8, 0))
    assert Counter(kind for kind, _ in made) == dict.fromkeys(noise.KINDS, 2)
    assert list(noise.documents(iter(texts), 8, 0)) == made != list(noise.documents(iter(texts), 8, 1))
    by_kind = dict(made)
    assert Counter(by_kind["characters"]) == Counter(texts[0])
    assert by_kind["characters"] != texts[0]
    assert Counter(by_kind["words"].split()) == Counter(texts[0].split())
    assert len(set(by_kind["boilerplate"].split(". "))) <= 3
    assert len(base64.b64decode(by_kind["base64"])) == 330
    assert all(len(text) <= 500 for _, text in made)


def test_the_texts_of_the_noise_are_of_one_length() -> None:
    texts = noise.pieces()
    assert {len(next(texts)) for _ in range(20)} == {noise.CHARACTERS}
