"""Expert parallelism besides the updates: evaluations, what ranks send each other against what the plan tells, and what
is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.batches import make_batch
from data_pipeline.errors import UserError
from pretrain.costs import memory
from pretrain.engine import deepspeed_config
from pretrain.objective.cross_entropy import sequence_cross_entropy
from pretrain.plan_experts import expert_communication, show_expert_communication
from tests.ranks import run_on_ranks

from .methods.experts import experts
from .steps import EOS, LENGTH, VOCABULARY, EngineRun, batch_of, tiny_config
from .test_expert_parallel import Case, configured

PLANNED: list[Case] = [
    ("balanced", 0, 2, 1, "none", {}),
    ("scoring pass", 1, 2, 2, "full", {"precision": "bf16"}),
]


def beside_padding(run: EngineRun) -> list[float]:
    """The loss of nine held-out tokens: alone, before padding, and before more of it and beside a hole."""
    found = []
    for length, samples in ((9, [0, 1]), (12, [0, 1]), (LENGTH, [0, -1])):
        rows = np.full((2, length + 1), EOS, dtype=np.uint16)
        rows[0, :9] = [5, 9, 40, EOS, 17, 33, 8, 60, 21]
        rows[1, 1:] = np.arange(3, 3 + length)
        batch = make_batch(rows, EOS, np.zeros(2, dtype=np.int64), np.array(samples), np.arange(2))
        logits = run.engine.forward(batch)
        found.append(float(sequence_cross_entropy(logits, batch.labels, batch.loss_mask)[0]))
    return found


def evaluated_and_counted() -> tuple[list[float], list[float], list[tuple[int, int]], list[tuple[int, int]]]:
    """On one of two ranks, by whole experts and by divided ones: an evaluation of other rows on each rank, and one by
    expert choice of a sequence beside more and more padding. For some cases besides: what a step sends, all-to-alls and
    bytes of rows and of counts, what the rank holds, bytes of weights and at stage 0 of optimizer state; and what the
    plan says of both."""
    from pretrain.distributed import start

    ranks = start(60)
    found, padded, seen, told = [], [], [], []
    plain = dist.all_to_all_single

    def counted(received: Tensor, sent: Tensor, *arguments: Any, **options: Any) -> None:
        moved.append((sent.dtype, sent.numel() * sent.element_size()))
        plain(received, sent, *arguments, **options)

    for size in (1, 2):
        run = EngineRun(configured(("balanced", 1, size, 1, "none", {}), 2), ranks)
        run.engine.evaluating(True)
        with torch.no_grad():
            own = [batch_of(0, rows) for rows in ((torch.arange(5).numpy(), torch.arange(1).numpy())[ranks.rank],)]
            found += [float(run.engine.forward(batch).float().square().mean()) for batch in own]
        run = EngineRun(configured(("expert choice", 1, size, 1, "none", {}), 2), ranks)
        run.engine.evaluating(True)
        with torch.no_grad():
            padded += beside_padding(run)
    moved: list[tuple[torch.dtype, int]] = []
    for case in PLANNED:
        config = configured(case, 2)
        run = EngineRun(config, ranks)
        moved.clear()
        dist.all_to_all_single = counted
        run.step(0)
        dist.all_to_all_single = plain
        rows = [size for dtype, size in moved if dtype != torch.int32]
        plan = expert_communication(config, 2)
        assert plan is not None
        # of what both ranks send, half is for the senders themselves when experts are balanced
        sent = int(ranks.all_reduce(torch.tensor(sum(rows))))
        seen += [(len(rows), sent // 2 // 2), (len(moved) - len(rows), 0)]
        told += [
            (
                plan["all_to_alls"] + plan["scoring_all_to_alls"],
                plan["bytes"] + plan["scoring_bytes"],
            ),
            (plan["counts"] + plan["scoring_all_to_alls"] // 2, 0),
        ]
        module, costs = run.engine._engine.module, memory(config, VOCABULARY, 2)
        state = [value for each in run.engine._optimizer.state.values() for value in each.values() if value.dim()]
        of_weights = sum(p.numel() * p.element_size() for p in module.parameters())
        seen.append((of_weights, 4 * sum(map(torch.numel, state)) if config.engine.zero_stage == 0 else 0))
        told.append((costs["weights_of_a_rank"], costs["optimizer_state_of_a_rank"] * (config.engine.zero_stage == 0)))
    return found, padded, seen, told


def test_unequal_batches_padding_and_what_moves() -> None:
    for (whole, divided), padded, seen, told in run_on_ranks(evaluated_and_counted, 2):
        assert divided == pytest.approx(whole, rel=1e-6)
        assert padded == pytest.approx([padded[0]] * 6, rel=1e-6)
        assert seen == told


def test_the_plan_for_people() -> None:
    config = configured(("balanced", 2, 2, 4, "full", {}), 4)
    assert show_expert_communication(expert_communication(config, 4)) == [
        "experts       2 of each block on a rank, in groups of 2 ranks",
        # 2 blocks x 4 micro-steps x 3 passes there and back, of 24 tokens x 2 slots x 32 features x 4 bytes, a half
        "exchange      48 all-to-alls of rows a step, 0.147 MB out of a rank when balanced, and 16 of counts; "
        "its scoring pass adds 16, 0.0492 MB, and 8",
    ]
    at_once = configured(("balanced", 2, 2, 1, "full", {}), 4)  # of one micro-step, which needs none
    assert "scoring" not in show_expert_communication(expert_communication(at_once, 4))[1]
    assert show_expert_communication(expert_communication(configured(("balanced", 2, 1, 4, "full", {}), 4), 4)) == []


def refused(size: int, **sections: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        tiny_config(**{**sections, "engine": {**sections.get("engine", {}), "expert_parallel": size}})
    return str(caught.value)


def test_what_can_not_be_divided_is_refused_before_any_work() -> None:
    model = experts({}).sections["model"]
    assert "model.experts is null; leave it out" in refused(2)
    assert "does not divide model.experts.number 4; 1, 2, 4 do" in refused(3, model=model)
    assert "at zero_stage 3" in refused(2, model=model, engine={"zero_stage": 3})
    message = refused(2, model=model, engine={"zero_stage": 0}, training={"precision": "bf16"})
    assert "leaves such experts out of the gradient's norm at zero_stage 0 in bf16" in message
    assert "'engine.expert_parallel' = 0" in refused(0)
    config = tiny_config(model=model, engine={"zero_stage": 2, "expert_parallel": 4})
    for ranks, fitting in ((6, "1 or 2"), (1, "1"), (2, "1 or 2")):
        with pytest.raises(
            UserError, match=rf"this run's {ranks} ranks are no multiple .*expert_parallel to {fitting}\."
        ):
            deepspeed_config(config, ranks)
    contrary = {"zero_optimization": {"reduce_scatter": False}}
    config = tiny_config(model=model, engine={"zero_stage": 2, "expert_parallel": 2, "deepspeed": contrary})
    with pytest.raises(UserError, match=r"zero_optimization\.reduce_scatter = False contradicts"):
        deepspeed_config(config, 2)
