"""Balancing in a run: what ranks tell each other, what changes on the way, the bias, what is refused before it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.errors import UserError
from pretrain.check import check_run, warnings
from pretrain.distributed import Distributed
from pretrain.objective import Objective
from pretrain.objective.balancing.base import ChangeSettings
from pretrain.objective.balancing.settings import BiasSettings

from .steps import VOCABULARY, batch_of, tiny_config
from .test_balancing import BALANCE, random_logits, routing_of


@pytest.mark.parametrize(
    ("balancing", "further"),
    [
        ({}, []),
        ({"losses": [{"kind": "router_z", "coefficient": 1.0}], "bias": {}}, []),
        ({"losses": [{**BALANCE, "coefficient": 1.0, "level": level} for level in ("sequence", "micro_batch")]}, []),
        ({"losses": [{**BALANCE, "coefficient": 1.0}]}, [2 * 6]),
        ({"losses": [{**BALANCE, "coefficient": 1.0, "frequencies": "buffer"}]}, [2 * 6] * 4),
        ({"losses": [{**BALANCE, "coefficient": 1.0, "frequencies": way} for way in ("previous_step", "running")]}, []),
    ],
)
def test_what_ranks_tell_each_other_in_a_step(
    monkeypatch: pytest.MonkeyPatch, balancing: dict[str, Any], further: list[int]
) -> None:
    """Two reductions a step, which a model without experts has too: what is counted goes with the second. The exact
    frequencies are one more, of [blocks, experts] numbers, a buffer one for each micro-step."""
    sizes: list[int] = []

    def counted(_: Distributed, tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    monkeypatch.setattr(Distributed, "all_reduce", counted)
    mixture = {"number": 6, "top_k": 2, "intermediate_size": 8, "selection_bias": "bias" in balancing}
    settings = tiny_config(model={"experts": mixture}, objective={"balancing": balancing}).objective
    objective = Objective(settings, 2, Distributed(0, 2, torch.device("cpu")))
    batches = [batch_of(0, np.arange(start, start + 2)) for start in (0, 2, 4, 6)]
    routed = [torch.cat([routing_of(random_logits(2, seed=layer), 2).packed for layer in range(2)]) for _ in batches]
    logits = torch.zeros(*batches[0].tokens.shape, VOCABULARY)
    objective.begin_step(0, batches)
    for batch, packed in zip(batches if objective.scores_first else [], routed, strict=False):
        objective.score(logits, batch, packed)
    for batch, packed in zip(batches, routed, strict=True):
        objective.micro_step(logits, batch, packed)
    routing = objective.end_step().routing
    assert routing is not None
    assert routing.loads.sum() == 2 * 8 * 10 * 2
    assert sizes[1:-1] == further
    # objective and norm; losses and labels by source; loads by block, source and expert; choices; sums of blocks
    assert sizes[-1] == 2 + 2 * 2 + 2 * 2 * 6 + 2 * 6 + 3 * 2 + len(settings.balancing.losses)


def test_changes_over_the_run() -> None:
    linear = ChangeSettings(to=1.0, begin_step=10, end_step=20)
    assert [linear.value(step, 3.0) for step in (0, 10, 15, 20, 99)] == [3.0, 3.0, 2.0, 1.0, 1.0]
    cosine = ChangeSettings(to=1.0, end_step=20, shape="cosine")
    assert [cosine.value(step, 3.0) for step in (0, 10, 20)] == [3.0, pytest.approx(2.0), 1.0]
    at_once = ChangeSettings(to=0.0, end_step=20, shape="at_once")
    assert [at_once.value(step, 3.0) for step in (0, 19, 20)] == [3.0, 3.0, 0.0]


def test_the_bias_moves_by_the_sign() -> None:
    loads = np.array([[4, 0, 3, 3], [2, 2, 2, 2]])  # means 2.5 and 2
    assert BiasSettings(rate=0.1).moves(0, loads).tolist() == [[-0.1, 0.1, -0.1, -0.1], [0.0] * 4]
    below = np.array([[2, 3, 3, 3]])  # 2 is fewer than the mean, 2.75, but no fewer than its whole part
    assert BiasSettings(rate=0.1).moves(0, below).tolist() == [[0.1, -0.1, -0.1, -0.1]]
    centred = BiasSettings(rate=0.1, subtract_mean=True).moves(0, loads)
    np.testing.assert_allclose(centred, [[-0.05, 0.15, -0.05, -0.05], [0.0] * 4])
    stopped = BiasSettings(rate=0.1, change=ChangeSettings(to=0.0, end_step=5, shape="at_once"))
    assert np.abs(stopped.moves(4, loads)).max() == 0.1
    assert np.abs(stopped.moves(5, loads)).max() == 0.0


@pytest.mark.parametrize(
    ("experts", "balancing", "told"),
    [
        (None, {"losses": [{"kind": "router_z", "coefficient": 1e-3}]}, "no meaning without model.experts"),
        ({}, {"bias": {}}, "model.experts.selection_bias, which is off"),
        ({"selection_bias": True}, {}, "stays 0 without objective.balancing.bias"),
        ({}, {"losses": [{"kind": "entropy", "coefficient": 1e-2}]}, "entropy needs model.experts.entropy"),
        ({"entropy": {}}, {}, "used by neither routing hybrid nor a loss of kind entropy"),
        (
            {"routing": "expert_choice", "normalised": False},
            {"losses": [{**BALANCE, "coefficient": 1.0}]},
            "all experts have the same load",
        ),
        ({}, {"losses": [{**BALANCE, "coefficient": 1.0}] * 2}, "losses holds global_batch twice"),
        (
            {},
            {"losses": [{**BALANCE, "coefficient": 1.0, "level": "sequence", "frequencies": "buffer"}]},
            "frequencies buffer has no meaning with level sequence",
        ),
        ({}, {"losses": [{**BALANCE, "coefficient": 1.0, "decay": 0.5}]}, "decay 0.5 belongs to frequencies running"),
        ({}, {"sample_weights": True}, "no meaning without losses"),
        (
            {},
            {"losses": [{**BALANCE, "coefficient": 1.0}], "sample_weights": True},
            "sample_weights has no meaning without reweighting",
        ),
        ({}, {"losses": [{"kind": "router_z"}]}, "coefficient"),
        (
            {},
            {
                "losses": [
                    {"kind": "router_z", "coefficient": 1.0, "change": {"to": 0.0, "begin_step": 5, "end_step": 5}}
                ]
            },
            "end_step 5 is not after begin_step 5",
        ),
    ],
)
def test_refusals(experts: dict[str, Any] | None, balancing: dict[str, Any], told: str) -> None:
    mixture = None if experts is None else {"number": 4, "top_k": 2, "intermediate_size": 8, **experts}
    with pytest.raises(UserError) as caught:
        tiny_config(model={"experts": mixture}, objective={"balancing": balancing})
    assert told in str(caught.value)


def told_before_a_run(world_size: int = 1, **sections: Any) -> str:
    mixture = {"number": 4, "top_k": 2, "intermediate_size": 8}
    training = {"global_batch": 8, "micro_batch": 2, **sections.pop("training", {})}
    config = tiny_config(model={"experts": mixture}, training=training, **sections)
    with pytest.raises(UserError) as caught:
        check_run(config, world_size)
    return str(caught.value)


def test_what_a_run_can_not_do_is_told_before_it() -> None:
    exact = {"losses": [{**BALANCE, "coefficient": 1.0}]}
    weighed = {"strategy": "linupper", "temperature": 1.0}
    told = told_before_a_run(objective={"balancing": {**exact, "sample_weights": True}, "reweighting": weighed})
    assert "4 micro-steps" in told
    assert "group=global_batch" in told
    one_pass = {**weighed, "group": "global_batch_one_pass"}
    told = told_before_a_run(objective={"balancing": exact, "reweighting": one_pass})
    assert "would be multiplied too" in told
    late = {"losses": [{**BALANCE, "coefficient": 1.0, "change": {"to": 0.0, "end_step": 3}}]}
    told = told_before_a_run(objective={"balancing": late})
    assert "objective.balancing.losses.0.change ends at step 3" in told
    for fine in (
        {"balancing": {**exact, "sample_weights": True}, "reweighting": {**weighed, "group": "global_batch"}},
        {"balancing": exact, "reweighting": weighed},
    ):
        assert "nowhere" in told_before_a_run(objective=fine), "the data is what is missing"
    assert "nowhere" in told_before_a_run(4, objective={"balancing": exact, "reweighting": one_pass})


def test_routing_that_is_not_causal_is_warned_of() -> None:
    mixture = {"number": 4, "top_k": 2, "intermediate_size": 8}
    assert warnings(tiny_config(model={"experts": mixture}), 1) == []
    chosen = {**mixture, "routing": "expert_choice", "normalised": False}
    (told,) = warnings(tiny_config(model={"experts": chosen}), 1)
    assert "expert_choice lets later tokens decide" in told
