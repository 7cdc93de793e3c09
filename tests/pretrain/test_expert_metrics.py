"""What metric lines say of experts, against figures by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from data_pipeline.settings import build_settings
from pretrain.expert_metrics import expert_metrics, selection_bias_range, specialization
from pretrain.model import ModelSettings
from pretrain.objective import RoutingStatistics

SHAPE = {"hidden_size": 16, "layers": 3, "heads": 2, "intermediate_size": 24}
MODEL = build_settings(
    ModelSettings,
    {**SHAPE, "experts": {"number": 4, "top_k": 2, "intermediate_size": 8, "dense_first": 1}},
    "test",
)


def test_specialization() -> None:
    assert specialization(np.array([[3.0, 3, 3, 3], [5, 5, 5, 5]])) == pytest.approx(0.0, abs=1e-12)
    assert specialization(np.array([[3.0, 9, 0, 0], [0, 0, 4, 1]])) == pytest.approx(1.0)
    assert specialization(np.array([[3.0, 9, 0, 0], [0, 0, 0, 0]])) == 0.0
    # two sources of equal weight; a half of each one's slots is told, the other half is not
    half = specialization(np.array([[2.0, 0, 1, 1], [0, 2, 1, 1]]))
    assert half == pytest.approx(0.5)
    # as many sources as anybody likes: what they have in common is not specialization
    assert specialization(np.array([[4.0, 0], [4, 0], [0, 4], [0, 4]])) == pytest.approx(math.log(2) / math.log(4))


def test_metrics_of_a_step() -> None:
    loads = np.array([[[4, 2, 0, 0], [4, 2, 0, 0]], [[3, 0, 0, 3], [0, 3, 3, 0]]])
    statistics = RoutingStatistics(
        loads, 6, np.array([1.0, 0.5]), np.array([3, 0]), {"global_batch": 1.25, "router_z": 4.0}, {}
    )
    fields = expert_metrics(statistics, MODEL, ["code", "docs"])
    assert fields == {
        "experts/imbalance": pytest.approx((8 / 3 + 1) / 2),
        "experts/load_cv": pytest.approx((math.sqrt((25 + 1 + 9 + 9) / 4) / 3 + 0) / 2),
        "experts/dead": 2,
        "experts/entropy": 0.75,
        "experts/dropped": 3 / 24,
        "experts/specialization": pytest.approx(0.5),
        "experts/loss/global_batch": 1.25,
        "experts/loss/router_z": 4.0,
        "experts/imbalance/1": pytest.approx(8 / 3),
        "experts/imbalance/2": 1.0,
        "experts/entropy/1": 1.0,
        "experts/entropy/2": 0.5,
        "experts/specialization/1": pytest.approx(0.0, abs=1e-12),
        "experts/specialization/2": pytest.approx(1.0),
        "experts/load/1": [0.666667, 0.333333, 0.0, 0.0],
        "experts/load/2": [0.25] * 4,
        "experts/domain_load/1/code": [0.666667, 0.333333, 0.0, 0.0],
        "experts/domain_load/1/docs": [0.666667, 0.333333, 0.0, 0.0],
        "experts/domain_load/2/code": [0.5, 0.0, 0.0, 0.5],
        "experts/domain_load/2/docs": [0.0, 0.5, 0.5, 0.0],
    }


def test_a_source_without_tokens_and_a_step_without_any() -> None:
    loads = np.array([[[4, 2, 0, 0], [0, 0, 0, 0]]] * 2)
    fields = expert_metrics(RoutingStatistics(loads, 3, np.ones(2), np.zeros(2, int), {}, {}), MODEL, ["code", "docs"])
    assert "experts/domain_load/1/code" in fields
    assert "experts/domain_load/1/docs" not in fields
    assert (
        expert_metrics(RoutingStatistics(0 * loads, 0, np.ones(2), np.zeros(2, int), {}, {}), MODEL, ["a", "b"]) == {}
    )


def test_bias_range() -> None:
    assert selection_bias_range(torch.tensor([[0.1, -0.2], [0.0, 0.05]])) == pytest.approx(0.3)
