"""What an optimizer step through the engine costs over a plain PyTorch loop: one process, alternating, one run.

    python benchmarks/step_overhead.py [--steps 24] [--save]

A 13M-parameter decoder, 512 tokens a step, fp32, the same fused AdamW, clipping by global norm. The
plain loop is the least that trains: forward, cross-entropy over the step's labels, backward, clip, step. Ours is the
training loop's own step with everything it does: the loader's batches, denominators, statistics, the engine's step.
Engines take turns step by step, so that whatever else the machine does falls on all of them alike; the ratio is of
medians. Limits (exit code 1 beyond them): ZeRO 0 1.05x, ZeRO 1 1.12x, data wait 1 % of the step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F

from data_pipeline import BatchPlan, Order, OrderSource, StepLoader, TokenSource
from data_pipeline.settings import build_settings
from data_pipeline.testing import write_token_dataset
from pretrain.config import Config
from pretrain.distributed import Distributed, finish, start
from pretrain.engine import Engine
from pretrain.model import Decoder, count_parameters, initialize_
from pretrain.objective import Objective
from pretrain.optimizer import parameter_groups

VOCABULARY, LENGTH, BATCH, MICRO = 400, 256, 2, 2
LIMITS = {0: 1.05, 1: 1.12}


def settings(stage: int) -> Config:
    return build_settings(
        Config,
        {
            "run": {"name": "benchmark"},
            "data": {"sources": {"text": {"path": "unused"}}, "seq_len": LENGTH},
            "model": {"vocab_size": VOCABULARY, "hidden_size": 384, "layers": 7, "heads": 6, "intermediate_size": 1024},
            "training": {"steps": 10, "global_batch": BATCH, "micro_batch": MICRO, "precision": "fp32"},
            "engine": {"zero_stage": stage},
        },
        "benchmark",
    )


def data(folder: Path) -> tuple[Order, TokenSource]:
    random = np.random.default_rng(0)
    documents = [random.integers(4, VOCABULARY, 3000).tolist() for _ in range(40)]
    write_token_dataset(folder, {("text", "train"): documents}, block_tokens=4096, vocab_size=VOCABULARY)
    source = TokenSource(folder, None, "train", LENGTH)
    return Order(0, [OrderSource("text", source.sequences)]), source


def loader(order: Order, source: TokenSource) -> StepLoader:
    return StepLoader(
        order,
        [source],
        rank=0,
        world_size=1,
        micro_batch=MICRO,
        plan=BatchPlan(BATCH),
        seq_len=LENGTH,
        start_step=0,
        start_position=0,
        end_step=10**6,
        prefetch=4,
    )


def plain_step(config: Config, batches: StepLoader) -> Callable[[], float]:
    model = Decoder(config.model, VOCABULARY)
    initialize_(model, config.run.seed)
    optimizer = config.optimizer.build(parameter_groups(model.named_parameters(), config.optimizer))

    def step() -> float:
        micro_batches = batches.next_step().micro_batches
        labels = sum(int(batch.loss_mask.sum()) for batch in micro_batches)
        optimizer.zero_grad()
        for batch in micro_batches:
            logits = model(batch.tokens, batch.positions, batch.document_ids, batch.single_document)
            targets = batch.labels.masked_fill(~batch.loss_mask, -100).flatten()
            (F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        return 0.0

    return step


def engine_step(config: Config, batches: StepLoader, ranks: Distributed) -> Callable[[], float]:
    engine = Engine(config, VOCABULARY, ranks)
    objective = Objective(config.objective, 1, ranks)

    def step() -> float:
        made = batches.next_step()
        engine.begin_step(len(made.micro_batches))
        objective.begin_step(0, made.micro_batches)
        for micro_batch in made.micro_batches:
            batch = micro_batch.to(ranks.device)
            engine.backward(objective.micro_step(engine.forward(batch), batch))
        float(engine.step(3e-4))
        objective.end_step([False, False, False])
        return batches.waited

    return step


def measure(steps: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        order, source = data(Path(folder))
        contenders = {"plain": plain_step(settings(0), loader(order, source))}
        ranks = start(60)
        for stage in LIMITS:
            contenders[f"zero {stage}"] = engine_step(settings(stage), loader(order, source), ranks)
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        waits: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(steps + 3):
            for name, step in contenders.items():
                started = time.perf_counter()
                waited = step()
                if turn >= 3:  # the first steps allocate
                    seconds[name].append(time.perf_counter() - started)
                    waits[name].append(waited)
    plain = statistics.median(seconds["plain"])
    return {
        "parameters": count_parameters(settings(0).model, VOCABULARY).total,
        "tokens_per_step": BATCH * LENGTH,
        "steps": steps,
        "plain_seconds": plain,
        "ratio": {name: statistics.median(seconds[name]) / plain for name in contenders},
        "data_wait": {name: sum(waits[name]) / sum(seconds[name]) for name in contenders if name != "plain"},
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread",
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24, help="measured steps of each contender")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/step_overhead.json")
    arguments = parser.parse_args()
    result = measure(arguments.steps)
    print(json.dumps(result, indent=2))
    if arguments.save:
        path = Path(__file__).parent / "results/step_overhead.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
    over = [f"zero {stage}" for stage, limit in LIMITS.items() if result["ratio"][f"zero {stage}"] > limit]
    over += [f"data wait of {name}" for name, share in result["data_wait"].items() if share > 0.01]
    if over:
        print(f"over the limit: {', '.join(over)}")
    finish(1 if over else 0, together=True)


if __name__ == "__main__":
    main()
