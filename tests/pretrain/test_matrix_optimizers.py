"""Muon and GaLore under DeepSpeed: each step against the plain loops, resume, their state's size, what is refused."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import HeadraceError, UserError
from pretrain.config import Config
from pretrain.model import parameter_shapes
from tests.marks import campaign
from tests.ranks import run_on_ranks

from .methods.optimizers import plain_galore, plain_muon
from .steps import RATES, VOCABULARY, EngineRun, relative_difference, tiny_config

PLAIN = {"muon": plain_muon, "galore": plain_galore}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "muon": {"kind": "muon", "eps": 1e-4},
    "galore": {"kind": "galore", "rank": 8, "gap": 3, "eps": 1e-4},
}
ODD = {"hidden_size": 33, "heads": 3, "kv_heads": 1, "head_dim": 8, "intermediate_size": 49}
"""Shapes of which no two ranks can have equal parts."""


def configured(kind: str, stage: int, precision: str, offload: str = "none") -> Config:
    engine = {"zero_stage": stage, "offload_optimizer": offload}
    if stage == 3:
        engine["persistence_threshold"] = 0
    training = {"precision": precision, "micro_batch": 2}
    return tiny_config(model=ODD, optimizer=OPTIMIZERS[kind], training=training, engine=engine)


def cases() -> list[tuple[str, int, str, str]]:
    return [
        (kind, stage, precision, offload)
        for kind in OPTIMIZERS
        for stage in (0, 1, 2, 3)
        for precision in ("fp32", "bf16")
        for offload in ("none", "cpu")
        if not (stage == 0 and offload == "cpu") and not (kind == "galore" and stage == 3)
    ]


def against_plain() -> list[tuple[Any, list[float], list[float]]]:
    """For each case: how far the update of each step is from the plain loop's on the same gradients, and the norm."""
    from pretrain.distributed import start

    ranks, found = start(60), []
    for case in cases():
        run = EngineRun(configured(*case), ranks)
        masters = run.engine.full_parameters()
        update = PLAIN[case[0]](masters, run.config)
        apart, norms = [], []
        for step in range(4):
            run.backward(step)
            gradients = run.engine.full_gradients()
            norm = torch.sqrt(sum((gradient.square().sum() for gradient in gradients.values()), torch.zeros(())))
            before = {name: p.clone() for name, p in masters.items()}
            for name, p in masters.items():
                p.grad = gradients[name] * min(1.0, run.config.optimizer.clip_norm / (float(norm) + 1e-6))
            update(RATES[step % 3])
            norms.append(run.update(step)[0] / float(norm) - 1)
            after = run.engine.full_parameters()
            added = [{name: p[name] - before[name] for name in before} for p in (after, masters)]
            apart.append(relative_difference(*added))
            for name, p in masters.items():
                p.copy_(after[name])
        found.append((case, apart, norms))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [campaign(1), 2, campaign(4)])
def test_every_step_is_the_plain_one(world_size: int) -> None:
    """At every stage, in both precisions, offloaded or not: clipped by the true gradient's norm, then updated."""
    for results in run_on_ranks(against_plain, world_size):
        assert len(results) == len(cases())
        for case, apart, norms in results:
            assert max(apart) < 1e-4, (case, apart)
            assert max(map(abs, norms)) < (2e-3 if case[1:3] == (0, "bf16") else 1e-6), (case, norms)


LAYOUTS: list[tuple[str, int, dict[str, Any]]] = [
    ("muon", 3, {"sub_group_size": 2000}),
    ("muon", 1, {"parameter_alignment": True}),
    ("galore", 2, {"parameter_alignment": True}),
]


def other_layouts() -> list[float]:
    """How far the weights after three steps are from those of DeepSpeed's usual layout."""
    from pretrain.distributed import start

    ranks, found = start(60), []
    for kind, stage, zero in LAYOUTS:
        config = configured(kind, stage, "fp32")
        engine = config.engine.model_copy(update={"deepspeed": {"zero_optimization": zero}})
        usual, other = (EngineRun(each, ranks) for each in (config, config.model_copy(update={"engine": engine})))
        for step in range(3):
            usual.step(step)
            other.step(step)
        found.append(relative_difference(other.engine.full_parameters(), usual.engine.full_parameters()))
    return found


@pytest.mark.slow
def test_the_update_is_the_same_however_deepspeed_lays_out_its_tensors() -> None:
    for results in run_on_ranks(other_layouts, 2):
        for layout, apart in zip(LAYOUTS, results, strict=True):
            assert apart < 1e-6, (layout, apart)


def resumed() -> list[tuple[Any, bool, bool]]:
    """For each case without offloading: whether a resumed run has the same bits, and whether it went on at all."""
    from pretrain.distributed import start

    ranks, found = start(60), []
    for case in cases():
        if case[3] == "cpu":
            continue
        straight = EngineRun(configured(*case), ranks)
        for step in range(2):
            straight.step(step)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(ranks.broadcast_object(folder))
            straight.engine.save(path)
            saved = straight.engine.full_parameters()
            for step in range(2, 5):
                straight.step(step)
            again = EngineRun(configured(*case), ranks, empty=True)
            again.engine.load(path)
            ranks.barrier()
        for step in range(2, 5):
            again.step(step)
        one, other = straight.engine.full_parameters(), again.engine.full_parameters()
        same = all(torch.equal(one[name], other[name]) for name in one)
        found.append((case, same, not any(torch.equal(one[name], saved[name]) for name in one)))
    return found


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits() -> None:
    for results in run_on_ranks(resumed, 2):
        for case, same, moved in results:
            assert same, case
            assert moved, case


def moved_weights() -> list[str]:
    from pretrain.distributed import start
    from pretrain.engine.expert_groups import expert_groups
    from pretrain.engine.shards import shards_of

    ranks, found = start(60), []
    for stage in (1, 2, 3):
        for precision in ("fp32", "bf16"):
            engine = EngineRun(configured("muon", stage, precision), ranks).engine
            optimizer = engine._engine.basic_optimizer
            wrapper = engine._optimizer
            (number,) = (i for i, group in enumerate(optimizer.param_groups) if group["matrix"])
            if stage == 3:
                wrapper.fp32_partitioned_groups_flat[number].data += 1.0
            else:
                optimizer.param_groups[number]["params"][0].data += 1.0
            try:
                experts = expert_groups(1, ranks)
                shards_of(wrapper, optimizer.param_groups, engine._engine.module, stage, ranks, experts)
            except HeadraceError as error:
                found.append(str(error))
    return found


@pytest.mark.slow
def test_a_layout_that_is_not_the_known_one_is_refused() -> None:
    found = run_on_ranks(moved_weights, 2)
    for messages in found:
        assert len(messages) == 6
        assert all("the optimizer does not hold elements" in message for message in messages)


def sizes() -> list[tuple[str, int, int]]:
    from pretrain.distributed import start

    ranks, found = start(60), []
    for kind, settings in {**OPTIMIZERS, "adamw": {"kind": "adamw"}}.items():
        linear = ({"kind": "lost", "rank": 16, "column_fraction": 0.5, "modules": ("attention.query",)},)
        config = tiny_config(optimizer=settings, model={"linear": linear})
        run = EngineRun(config, ranks)
        run.step(0)
        state = run.engine._optimizer.state
        kept = sum(tensor.numel() for tensors in state.values() for tensor in _tensors(tensors) if tensor.dim())
        shapes = parameter_shapes(config.model, VOCABULARY)
        found.append((kind, kept, sum(config.optimizer.state_elements(*item) for item in shapes.items())))
    return found


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    return [value] if isinstance(value, Tensor) else []


def test_the_size_of_the_state_is_known_before() -> None:
    for kind, kept, told in run_on_ranks(sizes, 1)[0]:
        assert kept == told, kind


@pytest.mark.parametrize(
    ("settings", "stage", "message"),
    [
        (
            {"rank": 4},
            3,
            r"galore does not go with engine.zero_stage 3: the gradient of blocks.0.attention.query.weight \[32, 32\]",
        ),
        ({"rank": 17}, 1, r"rank 17 is more than the smaller side of blocks.0.attention.key.weight \[16, 32\]. Lower"),
        (
            {"rank": 4, "modules": ("attention.*", "mlp.*")},
            1,
            r"modules 'mlp.\*' matches no matrix of a block; known here: attention.query, attention.key, "
            r"attention.value, attention.output, feed_forward.gate, feed_forward.up, feed_forward.down$",
        ),
        (
            {"rank": 4, "modules": ("attention.key", "attention_norm")},
            1,
            r"'attention_norm' matches no matrix",
        ),
        ({"rank": 4, "modules": ()}, 1, r"modules \[\] matches no matrix"),
    ],
)
def test_galore_is_refused_where_it_can_not_be(settings: dict[str, Any], stage: int, message: str) -> None:
    config = tiny_config(optimizer={"kind": "galore", **settings}, engine={"zero_stage": stage})
    with pytest.raises(UserError, match=message):
        config.optimizer.check(config, parameter_shapes(config.model, VOCABULARY))
