"""The study of sparsity: its family, and what it reads out of the results."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pretrain.config import load_config
from studies.common.runs import BASE
from studies.sparsity import LOSSES, SIZES, Size, chosen, gain, report, runs

SIZE = Size(300, 3, widths=(32, 64), experts=(4, 8, 16))


def results() -> list[dict[str, Any]]:
    """Losses that fall by 0.1 with every doubling of E at k = 2 and rise by as much at k = 4; seeds differ a lot."""
    found = []
    for run in runs(SIZE):
        labels = dict(run.labels)
        effect = 0.1 * math.log2(labels["number"] / 4) * (-1 if labels["top_k"] == 2 else 1)
        heldout = 5.0 + labels["seed"] + effect * (1 + 0.01 * labels["seed"])
        routing = {"load_cv": 0.5, "dead": labels["number"] / 8}
        found.append({**labels, "train_loss": heldout - 0.5, "heldout_loss": heldout, "experts": routing})
    return found


def test_parameters_are_those_of_the_paper() -> None:
    """2 V d + L (4 d² + 6 d² E + d E) of sixteen blocks, its section 3; the norms come to it."""
    for width, experts, top_k in SIZE.shapes:
        count = SIZE.parameters[width, experts, top_k]
        norms, embeddings = (2 * 2 + 1) * width, 2 * 1024 * width
        for parameters, of_token in ((count.total, experts), (count.active, top_k)):
            blocks = 2 * (4 * width**2 + 6 * width**2 * of_token + width * experts)
            assert parameters == embeddings + blocks + norms


def test_differences_are_taken_seed_by_seed() -> None:
    found = results()
    value = gain(found, (32, 16, 2), (32, 4, 2), "heldout_loss")
    assert value.mean == pytest.approx(-0.204)
    assert value.half < 0.006
    del chosen(found, (32, 16, 2))[0]["heldout_loss"]
    assert gain(found, (32, 16, 2), (32, 4, 2), "heldout_loss").mean == math.inf


def test_the_report_has_every_model_and_says_what_experts_give() -> None:
    text, plots = report(results(), SIZE)
    assert "- d = 32, k = 2: from 4 to 16 experts -0.204 ± 0.005; the mean falls with every doubling;" in text
    assert "- d = 64, k = 4: from 4 to 16 experts 0.204 ± 0.005; the mean does not fall throughout;" in text
    assert "- d = 32, E = 16: from k = 2 to 4 0.408 ± 0.010;" in text
    assert "| 32 | 2 | 8 | 0.750 | 0.17 | 0.10 | 3.56 | 6.398 ± " in text
    assert text.count("| **-0.102 ± 0.002** | **-0.102 ± 0.002** | 0.50 | 1.0 |") == 2
    assert [len(plot.curves) for plot in plots] == [4, 6] * len(LOSSES)
    total, active = plots[2].curves[0], plots[3].curves[0]
    assert list(total.y) == pytest.approx([7.0, 6.898, 6.796])
    assert list(active.x) == [SIZE.parameters[32, 4, k].active for k in (2, 4)]


@pytest.mark.parametrize("name", SIZES)
def test_every_run_of_the_study_is_a_configuration(name: str) -> None:
    size = SIZES[name]
    assert len({run.name for run in runs(size)}) == len(runs(size)) == size.seeds * len(size.shapes)
    for run in [run for run in runs(size) if run.labels["seed"] == 2]:
        given = [f"{key}={str(value).replace('None', 'null')}" for key, value in run.overrides.items()]
        config = load_config(BASE, given)
        experts = config.model.experts
        assert experts is not None
        assert (experts.number, experts.top_k) == (run.labels["number"], run.labels["top_k"])
        assert experts.intermediate_size == 2 * config.model.hidden_size == 2 * run.labels["width"]
        assert [loss.label for loss in config.objective.balancing.losses] == ["global_batch", "router_z"]
        assert config.total_steps * config.training.global_batch * config.data.seq_len == size.tokens
