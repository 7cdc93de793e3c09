"""What experts cost: the layer beside others that compute as much, and balancing as a part of a step; all in turns.

    python benchmarks/moe.py [--turns 24] [--device cuda] [--save]

The layer, forward and backward pass of [4, 512] tokens of 512 features (CPU; on a GPU [8, 2048] of 2048 in bf16), 16
experts, 2 a token, against

- ``dense``: a feed-forward layer with the same multiplications by weights, one matrix and all tokens at once,
- ``loop``: the same experts one after the other, tokens found by comparing and added up by index, as in transformers,
- ``deepspeed``: DeepSpeed's own MoE layer (k = 2, nothing dropped, and with capacity 1) with the same experts.

Balancing: steps of a decoder with eight blocks of experts through engine and objective, with and without losses on
routers. Medians of CPU seconds on a CPU, of seconds on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.batches import Batch, make_batch
from data_pipeline.settings import build_settings
from pretrain.config import Config
from pretrain.distributed import Distributed, finish, start
from pretrain.engine import Engine, import_deepspeed
from pretrain.model import ModelSettings, initialize_
from pretrain.model.experts.layer import MixtureOfExperts
from pretrain.model.feed_forward import FeedForward
from pretrain.objective import Objective

EXPERTS, TOP_K, WARM_UP = 16, 2, 3
VOCABULARY, LENGTH, BATCH, EOS = 400, 256, 4, 3
BALANCING: dict[str, dict[str, Any]] = {
    "none": {},
    "global_batch exact, router_z": {
        "losses": [{"kind": "load_balance", "coefficient": 0.01}, {"kind": "router_z", "coefficient": 1e-3}]
    },
    "global_batch previous_step": {
        "losses": [{"kind": "load_balance", "coefficient": 0.01, "frequencies": "previous_step"}]
    },
    "micro_batch": {"losses": [{"kind": "load_balance", "coefficient": 0.01, "level": "micro_batch"}]},
}


def in_turn(names: Iterable[str], turn: int) -> list[str]:
    """Another one begins each turn: what the one before leaves in the caches is nobody's in particular."""
    known = list(names)
    return known[turn % len(known) :] + known[: turn % len(known)]


def timed(device: torch.device, action: Callable[[], object]) -> float:
    """Seconds: CPU time, or between two moments of the device."""
    if device.type == "cpu":
        started = time.process_time()
        action()
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return time.perf_counter() - started


class Looped(nn.Module):
    """The experts of a layer one by one."""

    def __init__(self, layer: MixtureOfExperts) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer, flat = self.layer, x.flatten(0, 1)
        scores = layer.router(x, None).softmax(-1).flatten(0, 1)
        weights, chosen = scores.topk(TOP_K, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        output = torch.zeros_like(flat)
        for expert in range(EXPERTS):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            rows = flat[token]
            gate = F.silu(F.linear(rows, layer.experts.gate[expert]))
            made = F.linear(gate * F.linear(rows, layer.experts.up[expert]), layer.experts.down[expert])
            output.index_add_(0, token, made * weights[token, slot, None].to(made.dtype))
        return output.view_as(x)


def layers(
    shape: ModelSettings, dense: ModelSettings, device: torch.device, dtype: torch.dtype
) -> dict[str, nn.Module]:
    ours = MixtureOfExperts("blocks.0.feed_forward", 0, shape)
    wide = FeedForward("blocks.0.feed_forward", dense)
    for layer in (ours, wide):
        initialize_(layer, 1)
    found: dict[str, nn.Module] = {"headrace": ours, "dense": wide, "loop": Looped(copy.deepcopy(ours))}
    import_deepspeed()
    from deepspeed.moe.layer import MoE

    assert shape.experts is not None
    for name, dropping in (("deepspeed", False), ("deepspeed, capacity 1", True)):
        expert = FeedForward("blocks.0.feed_forward", shape, shape.experts.intermediate_size)
        initialize_(expert, 1)
        found[name] = MoE(
            shape.hidden_size, expert, EXPERTS, k=TOP_K, capacity_factor=1.0, drop_tokens=dropping,
            top2_2nd_expert_sampling=False, use_rts=False,
        )  # fmt: skip
        found[name].set_deepspeed_parallelism()
    return {name: layer.to(device, dtype) for name, layer in found.items()}


def measure_layers(turns: int, device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    hidden, size, batch, length = (2048, 1024, 8, 2048) if on_gpu else (512, 256, 4, 512)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    mixture = {"number": EXPERTS, "top_k": TOP_K, "intermediate_size": size}
    shape = {"hidden_size": hidden, "layers": 1, "heads": 8, "intermediate_size": TOP_K * size}
    given = build_settings(ModelSettings, {**shape, "experts": mixture}, "benchmark")
    made = layers(given, build_settings(ModelSettings, shape, "benchmark"), device, dtype)
    x = torch.randn(batch, length, hidden, device=device, dtype=dtype, requires_grad=True)

    def passes(name: str) -> None:
        layer = made[name]
        output = layer(x, None, None)[0] if name == "headrace" else layer(x)
        output = output[0] if isinstance(output, tuple) else output
        output.sum().backward()
        layer.zero_grad()

    seconds: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(WARM_UP + turns):
        for name in in_turn(made, turn):
            taken = timed(device, partial(passes, name))
            if turn >= WARM_UP:
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    flops = 6 * batch * length * 3 * hidden * TOP_K * size
    return {
        "tokens": batch * length,
        "hidden_size": hidden,
        "expert_size": size,
        "dtype": str(dtype),
        "seconds": medians,
        "gigaflops_per_second": {name: flops / value / 1e9 for name, value in medians.items()},
        "speed_of_dense": {name: medians["dense"] / value for name, value in medians.items()},
    }


def settings(balancing: dict[str, Any]) -> Config:
    mixture = {"number": EXPERTS, "top_k": TOP_K, "intermediate_size": 256}
    shape = {"hidden_size": 256, "layers": 8, "heads": 4, "intermediate_size": 512, "experts": mixture}
    return build_settings(
        Config,
        {
            "run": {"name": "benchmark"},
            "data": {"sources": {"text": {"path": "unused"}}, "seq_len": LENGTH},
            "model": {"vocab_size": VOCABULARY, **shape},
            "objective": {"balancing": balancing},
            "training": {"steps": 10, "global_batch": BATCH, "micro_batch": BATCH, "precision": "fp32"},
            "engine": {"zero_stage": 1},
        },
        "benchmark",
    )


def random_batch(step: int) -> Batch:
    rows = np.random.default_rng(step).integers(4, VOCABULARY, (BATCH, LENGTH + 1)).astype(np.uint16)
    positions = np.arange(BATCH, dtype=np.int64)
    return make_batch(rows, EOS, np.zeros(BATCH, np.int64), positions, positions)


def stepper(config: Config, ranks: Distributed) -> Callable[[int], None]:
    engine = Engine(config, VOCABULARY, ranks)
    objective = Objective(config.objective, 1, ranks)
    saved: list[Any] = [None]

    def step(turn: int) -> None:
        batch = random_batch(turn)
        engine.begin_step(1)
        objective.begin_step(turn, [batch], None, saved[0])
        batch = batch.to(ranks.device)
        logits, routing = engine.training_forward(batch)
        engine.backward(objective.micro_step(logits, batch, routing))
        engine.step(1e-3)
        statistics_of_step = objective.end_step()
        assert statistics_of_step.routing is not None
        saved[0] = statistics_of_step.routing.frequencies

    return step


def measure_balancing(turns: int, ranks: Distributed) -> dict[str, Any]:
    steps = {name: stepper(settings(balancing), ranks) for name, balancing in BALANCING.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + turns):
        for name in in_turn(steps, turn):
            taken = timed(ranks.device, partial(steps[name], turn))
            if turn >= WARM_UP:
                seconds[name].append(taken)
    # pairs of one turn: what disturbs a turn disturbs all of it
    ratios = {name: [a / b for a, b in zip(values, seconds["none"], strict=True)] for name, values in seconds.items()}
    return {
        "tokens": BATCH * LENGTH,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "step_ratio": {name: statistics.median(values) for name, values in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=24, help="measured passes of each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/moe.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ranks = start(60)
    device = torch.device(arguments.device)
    balancing = measure_balancing(arguments.turns, ranks)
    on_gpu = device.type == "cuda"
    result = {
        "balancing": balancing,
        "layer": measure_layers(arguments.turns, device),
        "turns": arguments.turns,
        "machine": torch.cuda.get_device_name()
        if on_gpu
        else f"{platform.machine()}, {os.cpu_count()} cores, one thread",
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=2))
    if arguments.save:
        path = Path(__file__).parent / "results/moe.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
    finish(0, together=True)


if __name__ == "__main__":
    main()
