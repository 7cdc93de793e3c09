"""What models take beside each other: parameters and optimizer state by arithmetic, memory and time of a step measured.

All models are in one process and take turns step by step, so that whatever else the machine does falls on all of them.
On CPUs the time is the processor's, which waiting does not lengthen, and memory is counted at torch's dispatcher: the
bytes of all tensors that are alive at once. On a GPU they are the clock's and the allocator's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing import reductions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_pipeline.batches import Batch, make_batch
from pretrain.config import Config
from pretrain.costs import parts
from pretrain.distributed import Distributed, start
from pretrain.engine import Engine
from pretrain.objective import Objective

EOS = 2
WARM_UP = 3
"""Steps that memory is taken over; GaLore's first one holds its decompositions. They are in no time."""


_reference: Any = reductions.StorageWeakRef


class Cost(NamedTuple):
    """Of one model."""

    parameters: int
    optimizer_bytes: int
    peak_bytes: int
    """Alive at once in the first steps: weights, gradients, optimizer state, activations."""
    seconds: float
    """Median of a step."""
    ratios: tuple[float, float, float]
    """Quartiles of a step's time over that of the first model's in the same turn."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that operations in here have seen, while they are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._bound = 0
        """Not less than what is alive: what is gone is looked for only where this would be a new peak."""
        self._seen: dict[int, tuple[Callable[[], bool], int]] = {}
        """For each storage: whether it is gone, and its bytes."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, made)):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return made

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        known = self._seen.get(storage._cdata)
        if known is not None and not known[0]() and known[1] == storage.nbytes():
            return
        self._seen[storage._cdata] = _reference(storage).expired, storage.nbytes()
        self._bound += storage.nbytes()
        if self._bound > self.peak:
            self.peak = max(self.peak, self.alive())

    def alive(self) -> int:
        self._seen = {key: seen for key, seen in self._seen.items() if not seen[0]()}
        self._bound = sum(size for _, size in self._seen.values())
        return self._bound

    def begin(self) -> None:
        """Forget the peak so far."""
        self.peak = self.alive()


class Contender:
    """A model that takes steps on random tokens."""

    def __init__(self, config: Config, vocabulary: int, ranks: Distributed) -> None:
        self.config, self.vocabulary, self.ranks = config, vocabulary, ranks
        self._steps = 0
        self._on_gpu = ranks.device.type == "cuda"
        before = torch.cuda.memory_allocated() if self._on_gpu else 0
        with LiveBytes() as live:
            self._objective = Objective(config.objective, 1, ranks)
            self._engine = Engine(config, vocabulary, ranks)
            live.begin()
            if self._on_gpu:
                torch.cuda.reset_peak_memory_stats()
            for _ in range(WARM_UP):
                self.step()
        self.peak_bytes = torch.cuda.max_memory_allocated() - before if self._on_gpu else live.peak

    def step(self) -> float:
        """Seconds of a step: of the processor, or on a GPU of the clock."""
        batch = self._batch()
        started = self._now()
        self._engine.begin_step(1)
        self._objective.begin_step(self._steps, [batch])
        self._engine.backward(self._objective.micro_step(self._engine.forward(batch), batch))
        float(self._engine.step(1e-4))
        self._objective.end_step()
        self._steps += 1
        return self._now() - started

    def _now(self) -> float:
        if not self._on_gpu:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def _batch(self) -> Batch:
        rows, random = self.config.training.global_batch, np.random.default_rng(self._steps)
        tokens = random.integers(3, self.vocabulary, (rows, self.config.data.seq_len + 1)).astype(np.uint16)
        positions = np.arange(rows, dtype=np.int64)
        return make_batch(tokens, EOS, np.zeros(rows, np.int64), positions, positions).to(self.ranks.device)


def measure(configs: Mapping[str, Config], vocabulary: int, turns: int) -> dict[str, Cost]:
    """The costs of models; the first is what the others' times are ratios to. For a process of its own.

    Raises:
        ValueError: a step has several micro-steps; memory would be that of one.
    """
    for name, config in configs.items():
        if config.training.micro_batch != config.training.global_batch:
            raise ValueError(f"{name}: micro_batch is not global_batch")
    ranks = start(60)
    contenders = {name: Contender(config, vocabulary, ranks) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, contender in contenders.items():
            seconds[name].append(contender.step())
    first = next(iter(seconds.values()))
    found = {}
    for name, config in configs.items():
        of_parts = parts(config, vocabulary)
        found[name] = Cost(
            sum(part.parameters for part in of_parts),
            sum(part.optimizer_bytes for part in of_parts),
            contenders[name].peak_bytes,
            statistics.median(seconds[name]),
            quartiles([one / other for one, other in zip(seconds[name], first, strict=True)]),
        )
    return found


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return low, middle, high
