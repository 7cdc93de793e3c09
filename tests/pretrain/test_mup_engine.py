"""muP through the engine: exact at the base shape, and its groups and weights as they were after a checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.marks import campaign
from tests.ranks import run_on_ranks

from .steps import STEPS, VOCABULARY, micro_batches, run_engine, tiny_config
from .test_same_update import assert_same_bits

ITSELF = {"hidden_size": 32, "heads": 4, "intermediate_size": 48}
NARROW = {"hidden_size": 8, "heads": 4, "head_dim": 4, "intermediate_size": 16}


def at_base(stages: list[int], precisions: list[str]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """On one rank: steps without muP, and with the model as its own base shape."""
    from pretrain.distributed import start

    ranks = start(60)

    def seen(mup: dict[str, Any] | None, stage: int, precision: str) -> dict[str, Any]:
        return run_engine(
            tiny_config(
                model={"mup": mup},
                training={"micro_batch": 2, "precision": precision},
                engine={"zero_stage": stage, **({"persistence_threshold": 0} if stage == 3 else {})},
            ),
            ranks,
        )

    return [(seen(None, s, p), seen({"base": ITSELF}, s, p)) for s in stages for p in precisions]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [campaign(1), 2])
def test_at_the_base_shape_no_bit_of_a_run_changes(world_size: int) -> None:
    for plain, scaled in run_on_ranks(at_base, world_size, [0, 1, 2, 3], ["fp32", "bf16"])[0]:
        assert_same_bits(plain, scaled)


def saved_and_loaded(stages: list[int]) -> list[dict[str, Any]]:
    """On one rank: a run in one go, and the same one saved after its first step and loaded into another engine."""
    from pretrain.distributed import start
    from pretrain.engine import Engine
    from pretrain.objective import Objective, ObjectiveSettings

    ranks = start(60)
    found = []
    for stage in stages:
        for precision in ("fp32", "bf16"):
            configs = [
                tiny_config(
                    model={"mup": {"base": NARROW, "embedding_multiplier": 3.0, "output_multiplier": 2.0}},
                    optimizer={"weight_decay": decay},
                    training={"micro_batch": 2, "precision": precision},
                    engine={"zero_stage": stage, **({"persistence_threshold": 0} if stage == 3 else {})},
                )
                for decay in (0.1, 0.4)
            ]

            def steps(engine: Engine, numbers: range) -> list[float]:
                objective = Objective(ObjectiveSettings(), 2, ranks)
                losses = []
                for step in numbers:
                    batches = micro_batches(step, ranks, 2)
                    engine.begin_step(len(batches))
                    objective.begin_step(step, batches)
                    for batch in batches:
                        engine.backward(objective.micro_step(engine.forward(batch), batch))
                    engine.step(1e-2)
                    losses.append(objective.end_step().loss)
                return losses

            def groups(engine: Engine) -> list[dict[str, Any]]:
                return [{k: v for k, v in group.items() if k != "params"} for group in engine._optimizer.param_groups]

            with tempfile.TemporaryDirectory() as own:
                folder = Path(ranks.broadcast_object(own))
                through = Engine(configs[0], VOCABULARY, ranks)
                steps(through, range(1))
                before = through.full_parameters()
                through.save(folder)
                losses = steps(through, range(1, STEPS))
                again, other = (Engine(config, VOCABULARY, ranks) for config in configs)
                again.load(folder)
                other.load(folder)
                ranks.barrier()
            found.append(
                {
                    "case": f"stage {stage}, {precision}, {ranks.world_size} ranks",
                    "saved": before,
                    "loaded": again.full_parameters(),
                    "groups": [groups(engine) for engine in (again, other)],
                    "losses": (losses, steps(again, range(1, STEPS))),
                    "parameters": (through.full_parameters(), again.full_parameters()),
                }
            )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_loading_a_checkpoint_rescales_nothing(world_size: int) -> None:
    for found in run_on_ranks(saved_and_loaded, world_size, [0, 1, 2, 3])[0]:
        case = found["case"]
        for name, parameter in found["saved"].items():
            assert torch.equal(parameter, found["loaded"][name]), (case, name)
        assert found["losses"][0] == found["losses"][1], case
        for name, parameter in found["parameters"][0].items():
            assert torch.equal(parameter, found["parameters"][1][name]), (case, name)
        # of the configuration in force, by group: the head, then m = 2, 3 and 4, then what is not decayed
        for decay, made in zip((0.1, 0.4), found["groups"], strict=True):
            assert [group["lr_scale"] for group in made] == [1, 1 / 2, 1 / 3, 1 / 4, 1], case
            assert [group["weight_decay"] for group in made] == [decay, 2 * decay, 3 * decay, 4 * decay, 0], case
            assert {group["eps"] for group in made} == {1e-8 / 4}, case
