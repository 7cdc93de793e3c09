"""Initial weights and buffers are the same on every rank, for any number of ranks and any ZeRO stage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.model import Decoder, initialize_
from tests.ranks import run_on_ranks

from .steps import VOCABULARY, micro_batches, tiny_config

LINEAR = [
    {"kind": "lost", "rank": 6, "column_fraction": 0.2, "modules": ["attention.*"]},
    {"kind": "column_sparse", "column_fraction": 0.5, "modules": ["feed_forward.down"]},
]


def config(stage: int, **sections: dict[str, Any]) -> Any:
    engine = {"zero_stage": stage, **({"persistence_threshold": 0} if stage == 3 else {})}
    return tiny_config(**{"model": {"linear": LINEAR}, "engine": engine, **sections})


def buffers(engine: Any) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in engine._engine.module.named_buffers()}


def started() -> list[tuple[int, dict[str, Tensor], dict[str, Tensor]]]:
    """On one rank: of every stage the whole parameters and this rank's buffers before the first step."""
    from pretrain.distributed import start
    from pretrain.engine import Engine

    ranks = start(60)
    training = {"global_batch": 6}
    engines = [(stage, Engine(config(stage, training=training), VOCABULARY, ranks)) for stage in (0, 1, 2, 3)]
    return [(stage, engine.full_parameters(), buffers(engine)) for stage, engine in engines]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 3])
def test_every_rank_starts_with_what_one_process_draws(world_size: int) -> None:
    model = Decoder(config(0).model, VOCABULARY)
    initialize_(model, 7)
    for seen in run_on_ranks(started, world_size):
        for stage, parameters, found in seen:
            for name, parameter in model.named_parameters():
                assert torch.equal(parameters[name], parameter), (stage, name)
            assert found.keys() == dict(model.named_buffers()).keys()
            for name, buffer in model.named_buffers():
                assert found[name].dtype == torch.int64
                assert torch.equal(found[name], buffer), (stage, name)


class Rank(nn.Module):
    """Starts as whatever rank makes it: what must never show."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3))
        self.register_buffer("index", torch.empty(2, dtype=torch.int64))
        self.register_buffer("scratch", torch.empty(2), persistent=False)

    def initial_values(self, draw: object) -> dict[str, Tensor]:
        rank = int(os.environ["RANK"])
        return {"weight": torch.full((3,), float(rank)), "index": torch.full((2,), 2**40 + rank)}


def dealt(told: Path) -> list[tuple[list[float], list[int]]]:
    """On one rank: the values of five such modules, whole and under ZeRO-3."""
    import contextlib

    from pretrain.distributed import start
    from pretrain.engine import import_deepspeed
    from pretrain.engine.initial import fill_model

    ranks = start(60)
    deepspeed = import_deepspeed()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    whole = nn.Sequential(*(Rank() for _ in range(5)))
    with (told / f"{ranks.rank}").open("w") as file, contextlib.redirect_stdout(file):
        fill_model(whole, 1, ranks, tell_every=0.0)
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 4, "zero_optimization": {"stage": 3}}):
        sharded = nn.Sequential(*(Rank() for _ in range(5)))
    gathered = deepspeed.zero.GatheredParameters
    fill_model(sharded, 1, ranks, whole=gathered)
    with gathered(list(sharded.parameters())):
        return [
            ([float(module.weight.detach().mean()) for module in model], [int(module.index[1]) for module in model])
            for model in (whole, sharded)
        ]


def test_the_modules_are_dealt_out_and_every_rank_gets_the_makers_bits(tmp_path: Path) -> None:
    makers = [0, 1, 0, 1, 0]
    for seen in run_on_ranks(dealt, 2, tmp_path):
        for weights, indices in seen:
            assert weights == makers
            assert indices == [2**40 + maker for maker in makers]
    said = (tmp_path / "0").read_text().splitlines()
    assert [line.split(", about")[0] for line in said] == [
        f"initial weights: {done} of 5 modules" for done in (2, 4, 5)
    ]
    assert (tmp_path / "1").read_text() == ""


def unexpected(*arguments: object) -> None:
    raise AssertionError("a resume made initial values")


def resumed(root: Path) -> None:
    """On one of two ranks: two steps in one go, and with a save and a load between, in engines of another seed or of no
    values at all."""
    from pretrain.distributed import start
    from pretrain.engine import Engine, initial
    from pretrain.engine.weights import load_weights
    from pretrain.objective import Objective

    ranks = start(60)

    def step(engine: Any, settings: Any, number: int) -> float:
        objective = Objective(settings.objective, 2, ranks)
        batches = micro_batches(number, ranks, 2)
        engine.begin_step(len(batches))
        objective.begin_step(number, batches)
        for batch in batches:
            engine.backward(objective.micro_step(engine.forward(batch), batch))
        engine.step(1e-2)
        return objective.end_step().loss

    for stage, precision, empty in (
        (0, "fp32", True),
        (1, "bf16", True),
        (2, "fp32", False),
        (3, "fp32", True),
        (3, "bf16", True),
    ):
        where, training = f"stage {stage} {precision}", {"precision": precision, "micro_batch": 2}
        settings = config(stage, training=training)
        straight = Engine(settings, VOCABULARY, ranks)
        step(straight, settings, 0)
        folder = root / f"{stage}-{precision}"
        if ranks.rank == 0:
            folder.mkdir()
        ranks.barrier()
        straight.save(folder)
        last = step(straight, settings, 1)
        monkeypatch = pytest.MonkeyPatch()
        if empty:
            monkeypatch.setattr(initial, "initial_values", unexpected)
        # fills what nobody has filled with NaN: what loading leaves out would show
        torch.use_deterministic_algorithms(empty, warn_only=True)
        other = Engine(
            config(stage, training=training, run={"name": "other", "seed": 99}), VOCABULARY, ranks, empty=empty
        )
        torch.use_deterministic_algorithms(False)
        monkeypatch.undo()
        started = buffers(other)
        other.load(folder)
        assert step(other, settings, 1) == last, where
        for (name, expected), found in zip(buffers(straight).items(), buffers(other).values(), strict=True):
            assert found.dtype == torch.int64, (where, name)
            assert torch.equal(found, expected), (where, name)
        assert any(not torch.equal(started[name], value) for name, value in buffers(other).items()), "as they were"
        for name, expected in straight.full_parameters().items():
            assert torch.equal(other.full_parameters()[name], expected), (where, name)
        stored = load_weights(folder)
        model = Decoder(settings.model, VOCABULARY)
        model.load_state_dict(stored)  # strict: every buffer is there
        for name, expected in buffers(straight).items():
            assert stored[name].dtype == torch.int64, (where, name)
            assert torch.equal(stored[name], expected), (where, name)


@pytest.mark.slow
def test_buffers_are_saved_and_restored_to_the_bit(tmp_path: Path) -> None:
    run_on_ranks(resumed, 2, tmp_path)
