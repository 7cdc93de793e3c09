"""The study of parameterizations: its tuning, its runs, what it measures and what it reads out of the results."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from data_pipeline.errors import UserError
from pretrain.config import load_config
from pretrain.model import count_parameters
from studies.common import Run
from studies.common.runs import BASE, VOCABULARY
from studies.parameterization_costs import Cost, LiveBytes, measure, quartiles
from studies.parameterizations import (
    DENSE,
    LOST,
    SIZES,
    Found,
    Size,
    arguments,
    best,
    finals,
    next_powers,
    overrides_of,
    report,
    run_of,
    tune,
    variants,
)

SIZE = SIZES["short"]


def test_tuning_goes_on_until_the_best_rate_has_neighbours() -> None:
    asked: list[int] = []

    def do(runs: Sequence[Run]) -> list[dict[str, Any]]:
        asked.append(len(runs))
        found = []
        for run in runs:
            labels = dict(run.labels)
            at = -3 if labels["variant"] == "galore" else -9 if labels["variant"] == "sltrain" else -6
            assert labels["seed"] == 1
            # above 2^-3 everything diverges
            told = {"heldout_loss": 4.0 + (labels["power"] - at) ** 2} if labels["power"] <= -3 else {}
            found.append({**labels, **told, "commit": "c"})
        return found

    tuned = tune(SIZE, do)
    assert {name: sorted(losses) for name, losses in tuned.items()} == {
        **{name: [-7, -6, -5] for name in variants(SIZE)},
        "galore": [-7, -6, -5, -4, -3, -2],
        "sltrain": [-10, -9, -8, -7, -6, -5],
    }
    assert {name: best(losses) for name, losses in tuned.items()} == {
        **dict.fromkeys(variants(SIZE), -6),
        "galore": -3,
        "sltrain": -9,
    }
    assert tuned["galore"][-2] == math.inf
    assert asked == [30, 32, 34, 36]
    with pytest.raises(UserError, match="--report"):
        tune(SIZE, lambda runs: do(runs)[1:])


def test_the_grid_grows_by_one_at_the_end_where_the_best_is() -> None:
    assert next_powers({-6: 1.0, -7: 2.0}) == [-7, -6, -5]
    assert next_powers({-7: 1.0, -6: 2.0}) == [-8, -7, -6]
    assert next_powers({-7: 2.0, -6: 1.0, -5: 3.0}) == [-7, -6, -5]


@pytest.mark.parametrize("name", SIZES)
def test_every_run_of_the_study_is_a_configuration(name: str) -> None:
    size = SIZES[name]
    kinds = {}
    for variant in variants(size):
        run = run_of(size, variant, -6, 3)
        config = load_config(BASE, [*arguments(run.overrides), f"run.name={run.name}"])
        assert (config.optimizer.lr, config.run.seed, config.total_steps) == (2.0**-6, 3, size.steps)
        assert config.model.hidden_size == 4 * size.rank
        kinds[variant] = (config.model.linear[0].kind if config.model.linear else "dense", config.optimizer.kind)
    assert kinds == {
        "dense": ("dense", "adamw"),
        "dense, half init_std": ("dense", "adamw"),
        "dense, quarter init_std": ("dense", "adamw"),
        "low_rank": ("low_rank", "adamw"),
        "cola": ("cola", "adamw"),
        "sltrain": ("sltrain", "adamw"),
        "lost": ("lost", "adamw"),
        "lost, random columns": ("lost", "adamw"),
        "lost, gamma 1": ("lost", "adamw"),
        "galore": ("dense", "galore"),
    }


def found(size: Size) -> Found:
    """A seed's losses are apart by 0.1 a variant, and a little more for greater seeds; the third dense one is best."""
    effects = {name: 0.1 * place for place, name in enumerate(variants(size))}
    effects["dense, quarter init_std"] = -0.1
    results = [
        {**run_of(size, name, -6, seed).labels, "heldout_loss": 4.0 + seed + effect * (1 + 0.02 * seed)}
        for seed in (3, 2)
        for name, effect in effects.items()
    ]
    costs = {name: Cost(1000 * place, 2**20, 2**22 + 2**20 * place, 0.1, (0.9, 1.0 + place, 9.0))
             for place, name in enumerate(variants(size))}  # fmt: skip
    return Found({name: {-7: 2.0, -6: 1.0, -5: 3.0} for name in effects}, finals(results, size), costs)


def test_differences_are_taken_seed_by_seed() -> None:
    known = found(SIZE)
    assert known.finals[DENSE] == [6.0, 7.0]
    assert known.difference("low_rank", DENSE).mean == pytest.approx(0.3 * 1.05)
    assert known.difference("low_rank", DENSE).half < 0.04
    assert known.best_dense == "dense, quarter init_std"
    text, plots = report(known, SIZE)
    row = next(line for line in text.splitlines() if line.startswith("| low_rank"))
    assert row.startswith("| low_rank | 0.003 | 1.00 | 7.0 (1.75) | 4.00 (0.90 to 9.00) | 2^-6 | ")
    assert row.endswith("| 0.420 ± 0.051, worse |")
    assert "lost, random columns: 0.105 ± 0.013, worse; lost, gamma 1: 0.210 ± 0.025, worse" in text
    assert [len(plot.curves) for plot in plots] == [10] * 5
    assert known.difference(LOST, LOST).mean == 0.0


def test_live_bytes_are_those_of_tensors_alive_at_once() -> None:
    with LiveBytes() as live:
        kept = torch.ones(1000)  # 4,000 bytes
        gone = kept + 1
        view = gone.view(10, 100)
        del gone, view
        assert live.peak == 8000
        assert live.alive() == 4000
        live.begin()
        both = (kept * 2, kept * 3)
        assert live.peak == live.alive() == 12000
        del both
        kept.add_(1)
        assert live.peak == 12000
    assert quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)


def test_costs_of_a_model() -> None:
    """Between backward pass and update a dense model has its weights, as many gradients and two moments; before, in
    place of the moments of the first step, the logits and at least their gradient."""
    configs = {name: load_config(BASE, arguments(overrides_of(SIZE, name))) for name in (DENSE, "galore")}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        costs = process.submit(measure, configs, VOCABULARY, 2).result()
    dense, galore = costs[DENSE], costs["galore"]
    parameters = count_parameters(configs[DENSE].model, VOCABULARY).total
    logits = 4 * VOCABULARY * configs[DENSE].training.global_batch * configs[DENSE].data.seq_len
    assert dense.parameters == galore.parameters == parameters
    assert dense.optimizer_bytes == 8 * parameters > galore.optimizer_bytes
    assert 12 * parameters + 2 * logits < dense.peak_bytes < 16 * parameters + 8 * logits
    assert galore.peak_bytes < dense.peak_bytes
    assert (dense.seconds > 0.0, dense.ratios) == (True, (1.0, 1.0, 1.0))
    assert galore.ratios[0] > 0.0
    split = load_config(BASE, [*arguments(overrides_of(SIZE, DENSE)), "training.micro_batch=1"])
    with pytest.raises(ValueError, match="split: micro_batch"):
        measure({"split": split}, VOCABULARY, 1)
