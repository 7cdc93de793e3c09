"""One model of benchmarks/parameterizations.py in a process of its own, which does a step when it is told to."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipeline.batches import Batch, make_batch
from pretrain.config import Config, load_config
from pretrain.costs import RECOMPUTES, memory

CONFIGS = Path(__file__).parents[1] / "configs"
KINDS = ("dense", "low_rank", "cola", "lost", "sltrain", "galore")
GALORE_RANKS = {"60m": 128, "130m": 256, "1b": 512}
EOS = 2


class Trial(NamedTuple):
    """What is measured: a model's size and a step's."""

    size: str
    rows: int
    length: int
    layers: int | None = None
    """Blocks in place of the model's own."""

    @property
    def overrides(self) -> list[str]:
        """Of the shipped configuration, for a run on one process."""
        layers = [f"model.layers={self.layers}"] if self.layers else []
        batch = [f"training.global_batch={self.rows}", f"training.micro_batch={self.rows}"]
        engine = ["engine.zero_stage=0", "engine.overlap_communication=false", "training.precision=fp32"]
        return [f"data.seq_len={self.length}", *batch, *engine, *layers]


def configuration(size: str, kind: str, overrides: list[str] | None = None) -> Config:
    """The shipped configuration of a model; GaLore's is the dense one with its optimizer (the papers' ranks)."""
    suffix = "" if kind in ("dense", "galore") else f"_{kind}"
    optimizer = [f"optimizer={{kind: galore, rank: {GALORE_RANKS[size]}}}"] if kind == "galore" else []
    return load_config(CONFIGS / f"llama_{size}{suffix}.yaml", [*(overrides or []), *optimizer])


def recomputes(trial: Trial, kind: str) -> list[str]:
    """The ways of recompute that the model allows; GaLore's is the dense model, of which it is measured already."""
    config = configuration(trial.size, kind, trial.overrides)
    allowed = memory(config, config.model.resolve_vocab_size(32000), 1)["activations"]
    return [how for how in RECOMPUTES if how in allowed and (kind != "galore" or how == "none")]


class Process:
    """A contender's process; answers :meth:`ask` until it is ended."""

    def __init__(self, trial: Trial, kind: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, trial, kind))
        self._process.start()
        other.close()

    def ask(self, what: str, how: str) -> dict[str, Any]:
        """``step``: its CPU seconds; ``memory``: its bytes; ``first``: the first update. Recompute as ``how`` says."""
        self._connection.send((what, how))
        answer: dict[str, Any] = self._connection.recv()  # EOFError where the process is gone
        return answer

    def end(self) -> None:
        self._connection.send(None)
        self._process.join()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill() if any(error) else self.end()


def _serve(connection: Connection, trial: Trial, kind: str) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    contender = _Contender(trial, kind)
    while (asked := connection.recv()) is not None:
        what, how = asked
        contender.engine._engine.module.activation_checkpointing = how
        connection.send(getattr(contender, what)())
    os._exit(0)


class _Contender:
    def __init__(self, trial: Trial, kind: str) -> None:
        from pretrain.distributed import start
        from pretrain.engine import Engine
        from pretrain.objective import Objective

        self.trial, ranks = trial, start(60)
        config = configuration(trial.size, kind, trial.overrides)
        self.vocabulary = config.model.resolve_vocab_size(32000)
        self.objective = Objective(config.objective, 1, ranks)
        self.before = resident()
        self.engine = Engine(config, self.vocabulary, ranks)
        self.steps, self.first_update = 0, 0.0

    def step(self) -> dict[str, float]:
        batch = self.batch()
        started = time.process_time()
        self.engine.begin_step(1)
        self.objective.begin_step(self.steps, [batch])
        self.engine.backward(self.objective.micro_step(self.engine.forward(batch), batch))
        passed = time.process_time()
        float(self.engine.step(1e-4))
        self.objective.end_step()
        self.steps += 1
        taken = {"passes": passed - started, "update": time.process_time() - passed}
        self.first_update = self.first_update or taken["update"]
        return taken

    def first(self) -> dict[str, float]:
        """The first update, with GaLore's decompositions."""
        return {"first_update": self.first_update}

    def memory(self) -> dict[str, int]:
        self.step()  # makes the optimizer's state
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        for _ in range(2):
            self.step()
        peak = resident("VmHWM")
        model = self.engine._engine.module
        with _Storages() as storages:
            logits = self.engine.forward(self.batch())
            kept = storages.alive() - logits.untyped_storage().nbytes()
        states = self.engine._optimizer.state.values()
        return {
            "peak_bytes": peak - self.before,
            "kept_bytes": kept,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "buffer_bytes": sum(buffer.nbytes for buffer in model.buffers()),
            "optimizer_bytes": sum(tensor.nbytes for state in states for tensor in tensors(state)),
        }

    def batch(self) -> Batch:
        rows, random = self.trial.rows, np.random.default_rng(self.steps)
        tokens = random.integers(3, self.vocabulary, (rows, self.trial.length + 1)).astype(np.uint16)
        positions = np.arange(rows, dtype=np.int64)
        return make_batch(tokens, EOS, np.zeros(rows, np.int64), positions, positions)


def resident(which: str = "VmRSS") -> int:
    """Bytes of this process in memory, now or (``VmHWM``) at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:"))


def tensors(state: Any) -> list[Tensor]:
    """All tensors in nested dictionaries; a step's count is none."""
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors(value)]
    return [state] if isinstance(state, Tensor) and state.ndim else []


class _Storages(TorchDispatchMode):
    """Remembers, weakly, the memory of everything that is made."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {tensor.untyped_storage()._cdata for tensor in args if isinstance(tensor, Tensor)}
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known - self._made.keys():
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return made

    def alive(self) -> int:
        return sum(size for storage, size in self._made.values() if not storage.expired())
