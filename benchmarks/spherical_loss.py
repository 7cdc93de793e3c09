"""What the Z-loss costs beside the cross-entropy over all logits, by the size of the vocabulary: the head and the loss,
forward and backward, in one process.

    python benchmarks/spherical_loss.py [--rounds 5] [--save] [--short]

Features of ``TOKENS`` tokens and ``WIDTH`` values, fp32, one thread. Both take turns within a round; a ratio is the
median over the rounds of the ratio of CPU times within a round. Told are, of the Z-loss,

    token   a micro-step that is not the last one: the tokens' own work, and a gradient [V, d] with their labels' rows
    step    what comes once an optimizer step: statistics of the weights, dense part of their gradient
    1, 16   an optimizer step of 1 and of 16 micro-steps, computed from the two, over as much of the cross-entropy
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.linear.head import RowStatistics, logit_moments
from pretrain.objective.losses.spherical_z import SphericalZSettings

VOCABULARIES = (1024, 4096, 16_384, 65_536, 131_072)
TOKENS, WIDTH = 2048, 256


def seconds(run: Callable[[], Tensor], *inputs: Tensor) -> float:
    """CPU seconds of a loss and its gradients."""
    started = time.process_time()
    torch.autograd.grad(run(), inputs)
    return time.process_time() - started


def measure(vocabulary: int, tokens: int, width: int, rounds: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(1)
    weight = (0.02 * torch.randn(vocabulary, width, generator=random)).requires_grad_()
    x = torch.randn(tokens, width, generator=random, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,), generator=random)
    mask, loss = torch.ones(tokens, dtype=torch.bool), SphericalZSettings()

    def spherical(known: RowStatistics) -> Tensor:
        return loss.of_tokens(logit_moments(x, weight, labels, known), labels, mask).sum()

    inner, last = RowStatistics(), RowStatistics()
    inner.begin(last=False)
    spherical(inner)
    found: dict[str, list[float]] = {"full": [], "token": [], "whole": []}
    for _ in range(rounds + 1):
        last.begin()
        found["full"].append(seconds(lambda: F.cross_entropy(F.linear(x, weight), labels, reduction="sum"), x, weight))
        found["token"].append(seconds(lambda: spherical(inner), x, weight))
        found["whole"].append(seconds(lambda: spherical(last), x, weight))
    full, inside, whole = (values[1:] for values in found.values())  # the first round allocates

    def ratio(micro_steps: int) -> float:
        both = zip(full, inside, whole, strict=True)
        return statistics.median(((micro_steps - 1) * own + end) / (micro_steps * all_) for all_, own, end in both)

    return {
        "vocabulary": vocabulary,
        "full_microseconds_a_token": 1e6 * statistics.median(full) / tokens,
        "token_microseconds_a_token": 1e6 * statistics.median(inside) / tokens,
        "step_seconds": statistics.median(end - own for own, end in zip(inside, whole, strict=True)),
        "token_ratio": statistics.median(own / all_ for own, all_ in zip(inside, full, strict=True)),
        "ratio_of_1": ratio(1),
        "ratio_of_16": ratio(16),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/spherical_loss.json")
    parser.add_argument("--short", action="store_true", help="a few tokens and small vocabularies, to see that it runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    vocabularies, tokens, width, rounds = VOCABULARIES, TOKENS, WIDTH, given.rounds
    if given.short:
        vocabularies, tokens, width, rounds = VOCABULARIES[:2], 64, 32, 1
    rows = []
    for vocabulary in vocabularies:
        row = measure(vocabulary, tokens, width, rounds)
        rows.append(row)
        print(
            f"V = {vocabulary:,}: cross-entropy {row['full_microseconds_a_token']:.1f} us a token; Z-loss "
            f"{row['token_microseconds_a_token']:.1f} us ({row['token_ratio']:.3f}) and {row['step_seconds']:.3f} s "
            f"once a step; together {row['ratio_of_1']:.3f} with 1 micro-step, {row['ratio_of_16']:.3f} with 16",
            flush=True,
        )
    if given.save:
        machine = {"machine": f"{platform.machine()}, one thread", "torch": torch.__version__}
        result = {"tokens": tokens, "width": width, "rounds": rounds, **machine, "rows": rows}
        path = Path(__file__).parent / "results/spherical_loss.json"
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
