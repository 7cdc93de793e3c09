"""Checkpoints give whole fp32 weights, the optimizer's, from every stage: to us, and to DeepSpeed's own tool."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

from tests.ranks import run_on_ranks

from .steps import VOCABULARY, micro_batches, tiny_config


def read_back(root: Path) -> None:
    """On one of two ranks: train a step, save, and read the files as a stranger to Headrace would."""
    from pretrain.distributed import start
    from pretrain.engine import TAG, Engine
    from pretrain.engine.weights import load_weights
    from pretrain.objective import Objective

    ranks = start(60)
    for stage, precision, tied in itertools.product((0, 1, 2, 3), ("fp32", "bf16"), (False, True)):
        if tied == (precision == "bf16"):  # two of the four combinations of a stage are enough
            continue
        config = tiny_config(
            engine={"zero_stage": stage}, training={"precision": precision}, model={"tied_embeddings": tied}
        )
        engine, objective = Engine(config, VOCABULARY, ranks), Objective(config.objective, 2, ranks)
        batches = micro_batches(0, ranks, 1)
        engine.begin_step(len(batches))
        objective.begin_step(0, batches)
        for batch in batches:
            engine.backward(objective.micro_step(engine.forward(batch), batch))
        engine.step(1e-3)
        folder = root / f"{stage}-{precision}"
        if ranks.rank == 0:
            folder.mkdir()
        ranks.barrier()
        engine.save(folder)
        whole = engine.full_parameters()
        ranks.barrier()
        read = [load_weights(folder)]
        if stage:
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            read.append(get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG))
        for weights in read:
            assert set(weights) - {"head.weight"} == set(whole) - {"head.weight"}, (stage, precision)
            for name, value in whole.items():
                assert weights[name].dtype == torch.float32
                assert torch.equal(weights[name], value), (stage, precision, name)


def test_deepspeeds_tool_reads_our_checkpoints(tmp_path: Path) -> None:
    run_on_ranks(read_back, 2, tmp_path)
