"""The study of learning rates against widths: its runs, and what it reads out of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pretrain.config import load_config
from studies.common.runs import BASE
from studies.lr_transfer import MUP, SIZES, STANDARD, Size, best_rate, report, runs, summarise

SIZE = Size((32, 64, 128), tuple(2.0**p for p in range(-10, -3)), 3)


def results(size: Size, optimum: dict[str, float]) -> list[dict[str, Any]]:
    """Losses on exact parabolas whose minimum moves by ``optimum`` octaves for each doubling of the width."""
    found = []
    for run in runs(size):
        labels = dict(run.labels)
        doublings = math.log2(labels["width"] / size.widths[0])
        at = -7.3 + optimum[labels["parametrisation"]] * doublings + 0.1 * labels["seed"]
        loss = 4.0 - 0.2 * doublings + 0.05 * (math.log2(labels["lr"]) - at) ** 2
        # in the standard parametrisation the widest model begins badly: 2 of its 4 parts after the first
        bad = labels["width"] == 128 and labels["parametrisation"] == STANDARD
        found.append({**labels, "heldout_loss": loss, "curve": [9, *[9.0 if bad else loss] * 2, loss, loss]})
    return found


def test_the_best_rate_is_the_parabolas() -> None:
    rates = SIZE.rates
    losses = np.array([(math.log2(rate) + 6.6) ** 2 for rate in rates])
    assert best_rate(rates, losses) == pytest.approx(-6.6)
    assert best_rate(rates, losses[::-1].cumsum()) == -10.0
    losses[4] = math.inf  # beside the minimum
    assert best_rate(rates, losses) == -7.0


def test_slopes_of_the_best_rate() -> None:
    found = results(SIZE, {STANDARD: -1.0, MUP: 0.0})
    standard, mup = summarise(found, SIZE, STANDARD), summarise(found, SIZE, MUP)
    assert standard.slope == pytest.approx((-1.0, 0.0), abs=1e-9)
    assert mup.slope == pytest.approx((0.0, 0.0), abs=1e-9)
    assert standard.best[128].mean == pytest.approx(-7.3 + 0.2 - 2.0)
    assert standard.best[32] == mup.best[32]
    assert mup.carried[128] == mup.lowest[128]
    assert standard.carried[128].mean > standard.lowest[128].mean + 0.1
    assert (standard.wider_is_better, mup.wider_is_better) == (0.75, 1.0)
    text, plots = report(found, SIZE)
    assert "-1.00 ± 0.00 (standard) and 0.00 ± 0.00 (muP)" in text.replace("-0.00", "0.00")
    assert [len(plot.curves) for plot in plots] == [3, 3]


def test_a_diverged_run_is_infinitely_bad() -> None:
    found = results(SIZE, {STANDARD: -1.0, MUP: 0.0})
    for each in found:
        if each["width"] == 128 and each["lr"] >= 2.0**-9 and each["parametrisation"] == STANDARD:
            del each["heldout_loss"]
    assert summarise(found, SIZE, STANDARD).best[128].mean == -10.0


@pytest.mark.parametrize("name", SIZES)
def test_every_run_of_the_study_is_a_configuration(name: str) -> None:
    size = SIZES[name]
    base = size.widths[0]
    assert len({run.name for run in runs(size)}) == len(runs(size))
    for run in runs(size)[:: max(1, len(runs(size)) // 12)]:
        config = load_config(
            BASE, [f"{key}={str(value).replace('None', 'null')}" for key, value in run.overrides.items()]
        )
        width, mup = run.labels["width"], config.model.mup
        assert (config.model.hidden_size, config.optimizer.lr) == (width, run.labels["lr"])
        assert config.model.effective_head_dim == size.head_dim
        assert (mup is not None) == (run.labels["parametrisation"] == MUP)
        if mup:
            assert mup.base.hidden_size == base < width
    assert (config.total_steps, config.model.layers) == (size.steps, size.layers)
