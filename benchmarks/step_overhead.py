"""What an optimizer step through the engine costs over a plain PyTorch loop: one process, alternating, one run.

    python benchmarks/step_overhead.py [--steps 24] [--save] [--short]
    torchrun --standalone --nproc-per-node 2 benchmarks/step_overhead.py    # reweighting alone, with its gathers

A 13M-parameter decoder, 512 tokens a step, fp32, the same fused AdamW, clipping by global norm. The
plain loop is the least that trains: forward, cross-entropy over the step's labels, backward, clip, step. Ours is the
training loop's own step with everything it does: the loader's batches, denominators, statistics, the engine's step and
what the objective has to say in a line of metrics.
Contenders take turns step by step, in a rotating order, so that whatever else the machine does falls on all of them
alike; a ratio is the median over the rounds of the ratio within a round. Limits (exit code 1 beyond them): ZeRO 0
1.05x, ZeRO 1 1.12x, data wait 1 % of the step.

What reweighting costs is measured at ZeRO 1 with two micro-steps of 512 tokens, against the same engine with uniform
weights. Limits: 1.02x for the groups ``micro_step`` and ``global_batch_one_pass``; the cost of the scoring pass of
``global_batch`` is told. Where a rank is alone it waits for nobody, and its CPU time is held against the limits: it is
the same but for other programs on the machine, which disturb it less. With several ranks it is the clock's.
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
from pretrain.objective import LossRange, Objective
from pretrain.optimizer import parameter_groups
from pretrain.step_metrics import step_metrics

VOCABULARY, LENGTH, MICRO = 400, 256, 2
LIMITS = {0: 1.05, 1: 1.12}
GROUPS = ("micro_step", "global_batch_one_pass", "global_batch")
REWEIGHTING_LIMIT = 1.02
WARMUP = 3
"""Rounds that are not measured: they allocate."""

Contenders = dict[str, Callable[[], float]]
"""Each takes one optimizer step and returns the seconds that it waited for data."""


def settings(stage: int, batch: int, reweighting: dict[str, Any] | None = None) -> Config:
    return build_settings(
        Config,
        {
            "run": {"name": "benchmark"},
            "data": {"sources": {"text": {"path": "unused"}}, "seq_len": LENGTH},
            "model": {"vocab_size": VOCABULARY, "hidden_size": 384, "layers": 7, "heads": 6, "intermediate_size": 1024},
            "objective": {"reweighting": reweighting or {}},
            "training": {"steps": 10, "global_batch": batch, "micro_batch": MICRO, "precision": "fp32"},
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


def loader(order: Order, source: TokenSource, batch: int, ranks: Distributed) -> StepLoader:
    return StepLoader(
        order,
        [source],
        rank=ranks.rank,
        world_size=ranks.world_size,
        micro_batch=MICRO,
        plan=BatchPlan(batch),
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
    loss_range: LossRange | None = None

    def step() -> float:
        nonlocal loss_range
        made = batches.next_step()
        engine.begin_step(len(made.micro_batches))
        objective.begin_step(0, made.micro_batches, loss_range)
        if objective.scores_first:
            engine.evaluating(True)
            with torch.no_grad():
                for batch in made.micro_batches:
                    objective.score(engine.forward(batch), batch)
            engine.evaluating(False)
        for micro_batch in made.micro_batches:
            batch = micro_batch.to(ranks.device)
            engine.backward(objective.micro_step(engine.forward(batch), batch))
        if (factor := objective.gradient_factor()) is not None:
            engine.scale_gradients(factor)
        float(engine.step(3e-4))
        done = objective.end_step([False, False, False])
        loss_range = done.loss_range
        step_metrics(done, ["text"])
        return batches.waited

    return step


Rounds = dict[str, list[float]]
"""A number for every contender's step in every round."""


def take_turns(contenders: Contenders, rounds: int) -> tuple[Rounds, Rounds, Rounds]:
    """Seconds, CPU seconds and seconds of waiting for data."""
    seconds: Rounds = {name: [] for name in contenders}
    busy: Rounds = {name: [] for name in contenders}
    waits: Rounds = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds + WARMUP):
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            started, started_work = time.perf_counter(), time.process_time()
            waited = contenders[name]()
            if turn >= WARMUP:
                seconds[name].append(time.perf_counter() - started)
                busy[name].append(time.process_time() - started_work)
                waits[name].append(waited)
    return seconds, busy, waits


def ratios(seconds: Rounds, to: str) -> dict[str, float]:
    return {
        name: statistics.median(mine / theirs for mine, theirs in zip(values, seconds[to], strict=True))
        for name, values in seconds.items()
        if name != to
    }


def measure_engine(rounds: int, order: Order, source: TokenSource, ranks: Distributed) -> dict[str, Any]:
    contenders = {"plain": plain_step(settings(0, MICRO), loader(order, source, MICRO, ranks))}
    for stage in LIMITS:
        contenders[f"zero {stage}"] = engine_step(settings(stage, MICRO), loader(order, source, MICRO, ranks), ranks)
    seconds, busy, waits = take_turns(contenders, rounds)
    return {
        "tokens_per_step": MICRO * LENGTH,
        "plain_seconds": statistics.median(seconds["plain"]),
        "ratio": ratios(seconds, "plain"),
        "cpu_ratio": ratios(busy, "plain"),
        "data_wait": {name: sum(waits[name]) / sum(seconds[name]) for name in contenders if name != "plain"},
    }


def measure_reweighting(rounds: int, order: Order, source: TokenSource, ranks: Distributed) -> dict[str, Any]:
    batch, contenders = 2 * MICRO * ranks.world_size, {}
    for name in ("uniform", *GROUPS):
        chosen = {"strategy": "linupper", "temperature": 0.4, "group": name} if name != "uniform" else None
        contenders[name] = engine_step(settings(1, batch, chosen), loader(order, source, batch, ranks), ranks)
    seconds, busy, _ = take_turns(contenders, rounds)
    uniform = statistics.median(seconds["uniform"])
    scored = statistics.median(
        mine - theirs for mine, theirs in zip(seconds["global_batch"], seconds["uniform"], strict=True)
    )
    return {
        "tokens_per_step": batch * LENGTH,
        "ranks": ranks.world_size,
        "uniform_seconds": uniform,
        "ratio": ratios(seconds, "uniform"),
        "cpu_ratio": ratios(busy, "uniform"),
        "scoring_pass_seconds": scored,
    }


def measure(rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    ranks = start(600)
    with tempfile.TemporaryDirectory() as folder:
        order, source = data(Path(folder))
        alone = measure_engine(rounds, order, source, ranks) if ranks.world_size == 1 else {}
        return {
            "parameters": count_parameters(settings(0, MICRO).model, VOCABULARY).total,
            "steps": rounds,
            **alone,
            "reweighting": measure_reweighting(rounds, order, source, ranks),
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread",
            "torch": torch.__version__,
        }


def over_the_limits(result: dict[str, Any]) -> list[str]:
    ratio = result.get("cpu_ratio", {})
    over = [f"zero {stage}" for stage, limit in LIMITS.items() if ratio.get(f"zero {stage}", 0) > limit]
    over += [f"data wait of {name}" for name, share in result.get("data_wait", {}).items() if share > 0.01]
    cost = result["reweighting"]["cpu_ratio" if result["reweighting"]["ranks"] == 1 else "ratio"]
    return over + [f"reweighting in {name}" for name in GROUPS[:2] if cost[name] > REWEIGHTING_LIMIT]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24, help="measured steps of each contender")
    parser.add_argument("--short", action="store_true", help="three steps, to see that it runs; fails nothing")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/step_overhead*.json")
    arguments = parser.parse_args()
    result = measure(3 if arguments.short else arguments.steps)
    over, ranks = over_the_limits(result), result["reweighting"]["ranks"]
    if int(os.environ["RANK"]) == 0:
        print(json.dumps(result, indent=2))
        if arguments.save:
            name = "step_overhead" if ranks == 1 else f"step_overhead_{ranks}_ranks"
            path = Path(__file__).parent / f"results/{name}.json"
            path.write_text(json.dumps(result, indent=2) + "\n")
        if over:
            print(f"over the limit: {', '.join(over)}")
    finish(1 if over and not arguments.short else 0, together=True)


if __name__ == "__main__":
    main()
