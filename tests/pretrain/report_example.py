"""A run folder whose every number was computed: a bigram model of bytes trained in NumPy with LinUpper weights.

The run is stopped on request once, killed once (losing steps), skips one step, and finishes.
"""

from __future__ import annotations

import argparse
import inspect
import pydoc
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.monitor import AttemptsLog, Monitor, weight_histogram

BATCH, LENGTH, TOTAL_STEPS = 32, 32, 240
SKIPPED_STEP = 150
TEMPERATURE = 0.4  # LinUpper's r

CONFIG = f"""\
run:
  name: bigram <b>"bold"</b>
  seed: 1
data:
  seq_len: {LENGTH}
training:
  steps: {TOTAL_STEPS}
  global_batch: {BATCH}
objective:
  reweighting:
    strategy: linupper
    temperature: {TEMPERATURE}
"""
VERSIONS = {"headrace": "0.1.0", "python": "3.11.2", "torch": "2.13.0+cpu", "deepspeed": "0.19.8"}


@dataclass
class Bigram:
    """p(next byte | byte) = softmax of a row of ``logits`` [256, 256]; plain SGD on a weighted mean over sequences."""

    logits: np.ndarray[Any, np.dtype[np.float64]]

    def losses(self, batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The token mean of each row of ``batch`` [b, LENGTH + 1], in nats: [b]."""
        rows = self.logits[batch[:, :-1]]
        log_total = np.log(np.exp(rows).sum(-1))
        return (log_total - np.take_along_axis(rows, batch[:, 1:, None], -1)[..., 0]).mean(1)

    def step(self, batch: np.ndarray[Any, Any], weights: np.ndarray[Any, Any], rate: float) -> float:
        """One SGD step; returns the norm of the gradient."""
        inputs, targets = batch[:, :-1], batch[:, 1:]
        probability = np.exp(self.logits[inputs])
        probability /= probability.sum(-1, keepdims=True)
        np.put_along_axis(
            probability, targets[..., None], np.take_along_axis(probability, targets[..., None], -1) - 1, -1
        )
        rows = (probability * weights[:, None, None] / LENGTH).reshape(-1, 256)
        gradient = np.eye(256)[inputs.ravel()].T @ rows
        self.logits -= rate * gradient
        return float(np.sqrt((gradient**2).sum()))


def linupper(losses: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    spread = max(losses.max() - losses.min(), 1e-6)
    scores = np.minimum((2 * losses - losses.max() - losses.min()) / spread + 1, 1)
    weights = np.exp((scores - scores.max()) / TEMPERATURE)
    return weights / weights.sum()


class Trainer:
    """The order of the data is a function of the step; ``checkpoints`` keeps the logits at the steps resumed from."""

    def __init__(self) -> None:
        code = "".join(inspect.getsource(module) for module in (argparse, tempfile, inspect))
        docs = pydoc.render_doc(argparse) + pydoc.render_doc(np.ndarray) + pydoc.render_doc(np.linalg)
        self.text = {name: np.frombuffer(text.encode(), np.uint8) for name, text in (("code", code), ("docs", docs))}
        self.model = Bigram(np.zeros((256, 256)))
        self.checkpoints = {0: self.model.logits.copy()}

    def batch(self, seed: int, rows: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        random = np.random.default_rng(seed)
        names = random.choice(sorted(self.text), rows)
        starts = [random.integers(len(self.text[name]) - LENGTH) for name in names]
        pieces = [self.text[name][start : start + LENGTH + 1] for name, start in zip(names, starts, strict=True)]
        return np.stack(pieces).astype(np.int64), names

    def step(self, step: int) -> dict[str, Any]:
        began = time.perf_counter()
        batch, names = self.batch(step, BATCH)
        waited = time.perf_counter() - began
        losses = self.model.losses(batch)
        weights = linupper(losses)
        rate = 60.0 * min(step / 20, 0.5 * (1 + np.cos(np.pi * step / TOTAL_STEPS)))
        norm = self.model.step(batch, weights, 0.0 if step == SKIPPED_STEP else rate)
        seconds = time.perf_counter() - began
        relative = weights * BATCH
        return {
            "step": step, "position": step * BATCH, "tokens": step * BATCH * LENGTH,
            "loss": float(losses.mean()), "objective": float(losses @ weights), "learning_rate": float(rate),
            "grad_norm": norm, "step_seconds": seconds, "tokens_per_second": BATCH * LENGTH / seconds,
            "data_wait_seconds": waited, "skipped": int(step >= SKIPPED_STEP), "holes": 0,
            **{f"domain_loss/{name}": float(losses[names == name].mean()) for name in sorted(set(names))},
            "weights/ess": float(1 / (weights**2).sum() / BATCH),
            "weights/min": float(relative.min()), "weights/max": float(relative.max()),
            "weights/histogram": weight_histogram(relative), "weights/dropped": int(step >= SKIPPED_STEP),
            "weights/loss_min": float(losses.min()), "weights/loss_max": float(losses.max()),
            "weights/temperature": TEMPERATURE,
            **{f"weights/share/{name}": float(weights[names == name].sum()) for name in sorted(set(names))},
            **{f"weights/uniform_share/{name}": float((names == name).mean()) for name in sorted(set(names))},
        }  # fmt: skip

    def evaluation(self, step: int) -> dict[str, Any]:
        batch, names = self.batch(10**6, 256)
        losses = self.model.losses(batch)
        line: dict[str, Any] = {"evaluation": "heldout", "step": step, "tokens": int(batch[:, 1:].size)}
        for prefix, chosen in (("", losses), *((f"/{name}", losses[names == name]) for name in sorted(self.text))):
            domain = "domain_" if prefix else ""
            line[f"{domain}loss{prefix}"] = loss = float(chosen.mean())
            line[f"{domain}perplexity{prefix}"] = float(np.exp(loss))
            line[f"{domain}bits_per_byte{prefix}"] = float(loss / np.log(2))  # one token is one byte
        return line


def make_run(folder: Path) -> Path:
    """Train into ``folder`` and return it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    trainer = Trainer()
    _attempt(folder, trainer, 0, 80, "stopped")
    _attempt(folder, trainer, 80, 130, None)
    _attempt(folder, trainer, 120, TOTAL_STEPS, "done")
    return folder


def _attempt(folder: Path, trainer: Trainer, first: int, last: int, ending: str | None) -> None:
    monitor = Monitor(folder, first, TOTAL_STEPS, tensorboard=False, print=lambda text: None)
    attempts = AttemptsLog(folder)
    number = attempts.start(
        hosts=["node1"],
        world_size=2,
        versions=VERSIONS,
        first_step=first + 1,
        resumed_from=f"step_{first:09d}" if first else None,
        superseded_lines=monitor.superseded,
        lost_steps=monitor.lost_steps,
    )
    trainer.model.logits = trainer.checkpoints[first].copy()
    for step in range(first + 1, last + 1):
        monitor.log(trainer.step(step))
        if step == SKIPPED_STEP:
            monitor.event({"event": "skipped_step", "step": step, "message": "learning rate <zero>", "rank": 1})
        if step % 40 == 0:
            monitor.evaluation(trainer.evaluation(step))
            trainer.checkpoints[step] = trainer.model.logits.copy()
    monitor.close()
    if ending == "stopped":
        attempts.stop(number, last_step=last, reason="stopped", exit_code=75, signal="SIGTERM", message="saved step 80")
    elif ending == "done":
        attempts.stop(number, last_step=last, reason="done", exit_code=0)
