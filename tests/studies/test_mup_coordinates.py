"""The coordinate check of muP: what a step changes in the activations keeps its size at every width."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrain.model import Decoder, initialize_
from pretrain.optimizer import AdamWSettings
from pretrain.optimizer.kinds.muon import MuonSettings
from studies.mup_coordinates import VOCABULARY, coordinates, model_settings, record, shape, slopes

WIDTHS, SEEDS = (128, 256, 512), 5
LAYERS = [
    f"blocks.{block}.{layer}"
    for block in range(2)
    for layer in (
        *(f"attention.{name}" for name in ("query", "key", "value", "output")),
        *(f"feed_forward.{name}" for name in ("gate", "up", "down")),
    )
]


def changes(mup: Mapping[str, Any] | None, steps: int) -> dict[str, float]:
    """For each quantity, the slope of log mean |Δx| against log width after ``steps``; the mean over the seeds."""
    found = coordinates(WIDTHS, mup, AdamWSettings(lr=0.004, weight_decay=0.0), SEEDS, steps)
    return {
        name: float(np.mean(slopes(WIDTHS, sizes[:, :, 1]))) for (name, step), sizes in found.items() if step == steps
    }


def test_a_step_changes_as_much_at_every_width() -> None:
    """Every seed is fixed. Logits and scores lose what came from the random start of head and query, but never grow."""
    found = changes({}, 1)
    assert {name: found[name] for name in LAYERS} == pytest.approx(dict.fromkeys(LAYERS, 0.0), abs=0.05)
    assert found["embedding"] == pytest.approx(0.0, abs=0.01)
    for name in ("head", "blocks.0.attention scores", "blocks.1.attention scores"):
        assert -0.6 < found[name] < 0.05, name


def test_from_a_zero_head_and_query_the_logits_keep_their_size_too() -> None:
    zeros = {"zero_init_head": True, "zero_init_query": True}
    assert changes(zeros, 1)["head"] == pytest.approx(0.0, abs=0.05)
    second = changes(zeros, 2)
    assert {name: second[name] for name in LAYERS} == pytest.approx(dict.fromkeys(LAYERS, 0.0), abs=0.05)
    assert -0.3 < second["blocks.1.attention scores"] < 0.1


def test_the_standard_parametrisation_grows_with_the_width() -> None:
    found = changes(None, 1)
    assert min(found[name] for name in [*LAYERS, "head"]) > 0.5
    assert min(found["blocks.0.attention scores"], found["blocks.1.attention scores"]) > 1.0


def test_every_gradient_shrinks_as_the_width_grows() -> None:
    """Each entry as 1 / m, which is what Adam's eps follows; those behind the scores, which shrink at first, faster."""
    sizes: dict[str, np.ndarray[Any, Any]] = {}
    for i, width in enumerate(WIDTHS):
        for seed in range(SEEDS):
            model = Decoder(model_settings(width, {"base": shape(WIDTHS[0])}), VOCABULARY)
            initialize_(model, seed)
            rows = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))
            logits, _ = record(model, rows[:, :-1])
            F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                sizes.setdefault(name, np.zeros((len(WIDTHS), SEEDS)))[i, seed] = float(parameter.grad.abs().mean())
    for name, found in sizes.items():
        expected = -1.5 if name.endswith(("query.weight", "key.weight")) else -1.0
        # a gain has few entries: its mean is noisier
        tolerance = 0.3 if "norm" in name else 0.15
        assert np.mean(slopes(WIDTHS, found)) == pytest.approx(expected, abs=tolerance), name


def test_muon_changes_as_much_at_every_width() -> None:
    """Its rates are our derivation: this is what they rest on."""
    muon = MuonSettings(lr=0.03, adam_lr=0.004, weight_decay=0.0)
    found = coordinates((64, 128, 256), {}, muon, 3, 1)
    slope = {name: float(np.mean(slopes((64, 128, 256), found[name, 1][:, :, 1]))) for name in LAYERS}
    assert slope == pytest.approx(dict.fromkeys(LAYERS, 0.0), abs=0.08)


def test_slopes_are_those_of_a_power_law() -> None:
    sizes = np.array([[3.0 * w**0.5, 2.0 / w] for w in WIDTHS])
    assert slopes(WIDTHS, sizes) == pytest.approx([0.5, -1.0])
    assert all(math.isnan(slope) for slope in slopes(WIDTHS, sizes - sizes[:1]))


@torch.no_grad()
def test_the_scores_that_are_recorded_are_the_rotated_ones_times_their_scale() -> None:
    """The first token attends to itself alone, unrotated: its score is its query times its key."""
    base = {"hidden_size": 16, "heads": 4, "intermediate_size": 8}
    for mup, scale in ((None, 1 / math.sqrt(16)), ({"base": base}, math.sqrt(4) / 16)):
        model = Decoder(model_settings(64, mup), VOCABULARY)
        initialize_(model, 1)
        _, seen = record(model, torch.arange(10).view(1, 10))
        query = seen["blocks.1.attention.query"][0, 0].view(4, 16)
        key = seen["blocks.1.attention.key"][0, 0].view(2, 16).repeat_interleave(2, dim=0)
        expected = (query * key).sum(dim=1) * scale
        torch.testing.assert_close(seen["blocks.1.attention scores"][0, :, 0, 0], expected)
        assert len(seen) == len(LAYERS) + 2 + 2
