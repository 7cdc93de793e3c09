"""What parameterizations of the linear layers cost beside a dense model: parameters, memory, time of a step; one run.

    python benchmarks/parameterizations.py            # everything: results/parameterizations.*
    python benchmarks/parameterizations.py --short    # a trial in a minute: two blocks, short sequences; saves nothing

The models are configs/llama_{60m,130m}*.yaml, each in processes of its own, through the engine at ZeRO 0; GaLore is the
dense model with another optimizer. In place of the papers' 512 sequences of 256 tokens in bf16 a step has 4 of them in
fp32, so that it fits into 24 GB and one core; --rows changes that. Every way of recompute that a model allows is
measured with the same weights.

Each model has a process of its own, beside which only the dense model's is alive. Memory is the high-water mark of the
resident set over two steps (the kernel's, reset after a first step, and what is free given back), above what the
process had before the model was made; and, counted at the dispatcher, the bytes that are alive between forward and
backward pass besides weights and logits. Time is CPU time of one thread, which other programs on the machine disturb
less than the clock; model and dense model take turns step by step, and ratios are of the medians over the same turns.
Beside it stands what the papers claim, and `pretrain plan`'s numbers at 1B.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from parameterizations_process import KINDS, Process, Trial, configuration, recomputes
from parameterizations_report import render

from pretrain.costs import memory, parts
from pretrain.model import count_parameters

RESULTS = Path(__file__).parent / "results"


def measure(trial: Trial, turns: int) -> dict[str, dict[str, Any]]:
    """Of each model and way of recompute: bytes, and median CPU seconds beside those of the dense model's turns."""
    found: dict[str, dict[str, Any]] = {}
    with Process(trial, "dense") as dense:
        for kind in KINDS:
            if kind == "dense":
                found[kind] = measure_beside(dense, dense, trial, kind, turns)
            else:
                with Process(trial, kind) as process:
                    found[kind] = measure_beside(process, dense, trial, kind, turns)
    return found


def measure_beside(process: Process, dense: Process, trial: Trial, kind: str, turns: int) -> dict[str, Any]:
    """Of each way of recompute: ``memory``, and ``time`` with that of ``dense`` in the same turns."""
    ways = recomputes(trial, kind)
    memory = {how: process.ask("memory", how) for how in ways}
    seconds: dict[str, list[dict[str, float]]] = {how: [] for how in ways}
    base: list[dict[str, float]] = []
    for _ in range(turns):
        base.append(dense.ask("step", "none"))
        for how in ways:
            seconds[how].append(process.ask("step", how))
    first = process.ask("first", "none")
    found = {}
    for how in ways:
        found[how] = {"memory": memory[how], "time": {**_median(seconds[how]), **first}, "dense": _median(base)}
        ratio = sum(_median(seconds[how]).values()) / sum(_median(base).values())
        size = memory[how]["peak_bytes"] / 2**20
        print(f"{trial.size} {kind}, recompute {how}: {size:,.0f} MiB, {ratio:.2f} of the dense step", flush=True)
    return found


def _median(taken: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(each[key] for each in taken) for key in ("passes", "update")}


def planned(size: str) -> dict[str, dict[str, Any]]:
    """What ``pretrain plan`` says of each model as it is shipped."""
    found = {}
    for kind in KINDS:
        config = configuration(size, kind)
        vocabulary = config.model.resolve_vocab_size(32000)
        found[kind] = {
            "parameters": count_parameters(config.model, vocabulary).total,
            "flops_per_token": sum(part.flops_per_token for part in parts(config, vocabulary)),
            **memory(config, vocabulary, 1),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a trial: small, few turns, saves nothing")
    parser.add_argument("--turns", type=int, default=8, help="measured steps of each model")
    parser.add_argument("--rows", type=int, default=4, help="sequences of 256 tokens in a step")
    arguments = parser.parse_args()
    turns = 2 if arguments.short else arguments.turns
    trials = (
        [Trial("60m", rows=2, length=64, layers=2)]
        if arguments.short
        else [Trial(size, rows=arguments.rows, length=256) for size in ("60m", "130m")]
    )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=RESULTS, capture_output=True, text=True, check=False)
    result = {
        "measured": {trial.size: {**trial._asdict(), "found": measure(trial, turns)} for trial in trials},
        "planned": {size: planned(size) for size in ("60m", "130m", "1b")},
        "turns": turns,
        "machine": f"{platform.processor() or platform.machine()}, threads: {os.environ['OMP_NUM_THREADS']}, fp32",
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }
    text = render(result)
    print(text)
    if not arguments.short:
        (RESULTS / "parameterizations.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "parameterizations.md").write_text(text)


if __name__ == "__main__":
    main()
