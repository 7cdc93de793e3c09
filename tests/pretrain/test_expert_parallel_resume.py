"""Divided experts go on from a checkpoint: on the same topology to the bit; on other expert-parallel ranks and at other
ZeRO stages, 3 included, from the same bits to the same losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config import Config
from pretrain.distributed import Distributed
from pretrain.engine.weights import load_weights
from tests.ranks import run_on_ranks

from .methods.experts import losses
from .steps import tiny_config
from .test_topologies import Run

BATCH = 8
Topology = tuple[int, int, int]
"""Ranks, expert-parallel ranks of them, ZeRO stage."""

PATH: list[Topology] = [(4, 4, 1), (4, 2, 2), (4, 1, 3), (4, 4, 0), (2, 2, 1), (1, 1, 2), (2, 2, 0), (4, 4, 2)]
"""One optimizer step on each, and a checkpoint from one to the next."""


def configured(topology: Topology, optimizer: dict[str, Any], precision: str) -> Config:
    ranks, size, stage = topology
    if precision == "bf16":
        stage = max(stage, 1)  # at stage 0 it is refused
    engine: dict[str, Any] = {"zero_stage": stage, "expert_parallel": size}
    if stage == 3:
        engine["persistence_threshold"] = 0
    mixture = {
        "number": 4,
        "top_k": 2,
        "intermediate_size": 11,
        "shared": 1,
        "selection_bias": True,
        "score": "sigmoid",
        "jitter": 0.1,
    }
    return tiny_config(
        model={"experts": mixture, "layers": 3},
        objective={"balancing": {**losses({}), "bias": {"rate": 0.013}}},
        optimizer={"eps": 1e-4, **optimizer},
        training={"global_batch": BATCH, "micro_batch": BATCH // ranks, "precision": precision},
        engine=engine,
    )


def folder_of(root: Path, number: int) -> Path:
    return root / str(number)


def legs(root: Path, numbers: list[int], optimizer: dict[str, Any], precision: str) -> list[float]:
    """On one rank: some legs of the path, one after another; the loss of each."""
    from pretrain.distributed import start

    ranks = start(120)
    return [leg(root, number, ranks, optimizer, precision) for number in numbers]


def leg(root: Path, number: int, ranks: Distributed, optimizer: dict[str, Any], precision: str) -> float:
    config = configured(PATH[number], optimizer, precision)
    run = Run(config, ranks, empty=number > 0)
    if number:
        before = folder_of(root, number - 1)
        run.engine.load(before)
        held, weights = run.held(), run.engine.full_parameters()
        expected = torch.load(before / "held.pt", weights_only=False)
        assert held.keys() == expected.keys()
        for name, value in expected.items():
            same = torch.equal(held[name], value) if isinstance(value, torch.Tensor) else held[name] == value
            assert same, (PATH[number], name)
        for name, value in load_weights(before).items():
            if name in weights:
                assert torch.equal(weights[name], value), (PATH[number], name)
    loss, _, _ = run.step(number)
    folder = folder_of(root, number)
    if ranks.rank == 0:
        folder.mkdir()
    ranks.barrier()
    run.engine.begin_save(folder, later=number % 2 == 1)()  # every other one beside the training
    held, bias = run.held(), run.engine.selection_bias()
    if ranks.rank == 0:
        torch.save(held, folder / "held.pt")
    ranks.barrier()
    if config.engine.expert_parallel > 1:  # of whole experts test_experts_resume shows it
        again_equal(config, ranks, folder, run, number, bias)
    return loss


def again_equal(config: Config, ranks: Distributed, folder: Path, run: Run, number: int, bias: torch.Tensor) -> None:
    """On the same topology, the resumed run is the uninterrupted one, to the bit."""
    again = Run(config, ranks, empty=True)
    again.engine.load(folder)
    assert torch.equal(again.engine.selection_bias(), bias)
    assert run.step(number + 1) == again.step(number + 1), PATH[number]
    one, other = run.held(), again.held()
    for name, value in one.items():
        same = torch.equal(other[name], value) if isinstance(value, torch.Tensor) else other[name] == value
        assert same, (PATH[number], name)


def straight(steps: int, optimizer: dict[str, Any], precision: str) -> list[float]:
    """The same steps on one process without a break."""
    from pretrain.distributed import start

    run = Run(configured((1, 1, 1), optimizer, precision), start(120))
    return [run.step(step)[0] for step in range(steps)]


def assert_one_run(
    root: Path, turns: list[list[int]], optimizer: dict[str, Any], precision: str, tolerance: float
) -> None:
    """``turns``: the legs that are made on one number of ranks, one after another."""
    found: list[float] = []
    for numbers in turns:
        world = PATH[numbers[0]][0]
        found += run_on_ranks(legs, world, root, numbers, optimizer, precision)[0]
    expected = run_on_ranks(straight, 1, len(found), optimizer, precision)[0]
    assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.slow
def test_one_run_on_changing_expert_parallel_ranks(tmp_path: Path) -> None:
    assert_one_run(tmp_path, [[0, 1, 2, 3]], {}, "fp32", 1e-6)


@pytest.mark.campaign
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("optimizer", "precision", "tolerance"), [({}, "fp32", 1e-6), ({"kind": "muon"}, "fp32", 1e-5), ({}, "bf16", 1e-2)]
)
def test_and_on_changing_ranks(tmp_path: Path, optimizer: dict[str, Any], precision: str, tolerance: float) -> None:
    assert_one_run(tmp_path, [[0, 1, 2, 3], [4], [5], [6], [7]], optimizer, precision, tolerance)
