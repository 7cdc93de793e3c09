"""Measurements that need a process of their own: prints one JSON object.

python -m scale.probe first_batch DATASET MODE RANKS
python -m scale.probe order DATASET MODE
python -m scale.probe resume DATASET MODE
python -m scale.probe million FOLDER BATCHES
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
import torch

from data_pipeline import BatchPlan, Manifest, Order, OrderSource, StepLoader, TokenSource, read_manifest
from data_pipeline.testing import write_token_dataset
from data_pipeline.windows import Windows

_SEQ_LEN, _MICRO_BATCH, _GLOBAL_BATCH, _STRATA, _WINDOW = 4096, 8, 1024, 1024, 1024
_WEIGHTS = {"books": 0.2, "code": 0.3, "web": 0.5}


def open_order(sources: dict[str, TokenSource], mode: str) -> Order:
    """The mixture of all domains in one mode."""
    members = [OrderSource(name, source.sequences, _WEIGHTS[name]) for name, source in sources.items()]
    if mode == "full":
        return Order(0, members)
    return Order(0, members, mode="windowed", windows=Windows(_STRATA, _WINDOW))


def open_sources(dataset: Path, manifest: Manifest, ranks: int) -> dict[str, TokenSource]:
    """One source for each domain."""
    return {
        name: TokenSource(dataset, name, "train", _SEQ_LEN, manifest=manifest, share=(0, ranks))
        for name in manifest.domains
    }


def open_loader(order: Order, sources: dict[str, TokenSource], step: int) -> StepLoader:
    """Rank 0 of as many as share the global batch."""
    return StepLoader(
        order,
        list(sources.values()),
        rank=0,
        world_size=_GLOBAL_BATCH // _MICRO_BATCH,
        micro_batch=_MICRO_BATCH,
        plan=BatchPlan(_GLOBAL_BATCH),
        seq_len=_SEQ_LEN,
        start_step=step,
        start_position=step * _GLOBAL_BATCH,
        end_step=step + 1_000_000,
        prefetch=0,
    )


def first_batch(dataset: str, mode: str, ranks: str) -> dict[str, Any]:
    """Manifest, sources, order, loader, first batch: seconds and memory; imports came before."""
    before = psutil.Process().memory_info().rss
    peak_before = _peak()
    began = time.perf_counter()
    manifest = read_manifest(Path(dataset))
    manifest_seconds = time.perf_counter() - began
    sources = open_sources(Path(dataset), manifest, int(ranks))
    sources_seconds = time.perf_counter() - began - manifest_seconds
    loader = open_loader(open_order(sources, mode), sources, 0)
    (batch,) = loader.next_step().micro_batches
    seconds = time.perf_counter() - began
    assert batch.tokens.shape == (_MICRO_BATCH, _SEQ_LEN)
    return {
        "mode": mode,
        "ranks_that_share_the_check_of_files": int(ranks),
        "shards": len(manifest.shards),
        "tokens": int(manifest.shards.tokens.sum()),
        "seconds": seconds,
        "of_them_manifest": manifest_seconds,
        "of_them_sources": sources_seconds,
        "memory_growth_mb": (max(psutil.Process().memory_info().rss, _peak(peak_before)) - before) / 1e6,
    }


def order(dataset: str, mode: str) -> dict[str, Any]:
    """Microseconds of CPU time per sequence, by the size of the calls."""
    manifest = read_manifest(Path(dataset))
    sources = open_sources(Path(dataset), manifest, 100_000)
    made = open_order(sources, mode)
    costs = {}
    for chunk in (1024, 16_384, 65_536):
        calls = max(4, 200_000 // chunk)
        seconds = []
        for repetition in range(3):
            began = time.process_time()
            for call in range(calls):
                made.locate((repetition * calls + call) * chunk + 10**9, chunk)
            seconds.append(time.process_time() - began)
        costs[str(chunk)] = min(seconds) / calls / chunk * 1e6
    sequences = sum(source.sequences for source in sources.values())
    return {"mode": mode, "sequences": sequences, "microseconds_per_sequence_by_call": costs}


def resume(dataset: str, mode: str) -> dict[str, Any]:
    """A loader made at a far position against one at 0, in turns: milliseconds of CPU time to its first batch."""
    manifest = read_manifest(Path(dataset))
    sources = open_sources(Path(dataset), manifest, 100_000)
    made = open_order(sources, mode)
    steps = {"at_zero": 0, "far": 2_000_000}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(41):
        for name, step in steps.items():
            began = time.process_time()
            open_loader(made, sources, step + turn).next_step()
            seconds[name].append(time.process_time() - began)
    medians = {name: statistics.median(values[1:]) * 1e3 for name, values in seconds.items()}
    return {
        "mode": mode,
        "far_position": steps["far"] * _GLOBAL_BATCH,
        "milliseconds_to_first_batch": medians,
        "ratio": medians["far"] / medians["at_zero"],
    }


def million(folder: str, batches: str) -> dict[str, Any]:
    """Memory over many small batches of a tiny data set read for many epochs."""
    count = int(batches)
    if not (Path(folder) / "manifest.json").exists():
        random = np.random.default_rng(0)
        documents = [random.integers(4, 300, int(random.integers(20, 400))).tolist() for _ in range(4000)]
        write_token_dataset(Path(folder), {("text", "train"): documents}, block_tokens=1024, documents_per_shard=100)
    memory: dict[str, float] = {}
    marks = {count * share // 20 for share in range(1, 21)}
    began = time.perf_counter()
    with TokenSource(Path(folder), None, "train", 64) as source:
        loader = StepLoader(
            Order(0, [OrderSource("text", source.sequences)]),
            [source],
            rank=0,
            world_size=1,
            micro_batch=1,
            plan=BatchPlan(1),
            seq_len=64,
            start_step=0,
            start_position=0,
            end_step=count,
            prefetch=2,
        )
        with loader:
            for number, _ in enumerate(loader, 1):
                if number in marks:
                    memory[str(number)] = psutil.Process().memory_info().rss / 1e6
        epochs = count / source.sequences
    sizes = list(memory.values())
    return {
        "batches": count,
        "epochs": epochs,
        "seconds": time.perf_counter() - began,
        "rss_mb_after": memory,
        "growth_mb_after_the_first_twentieth": sizes[-1] - sizes[0],
        "growth_mb_in_the_second_half": sizes[-1] - sizes[len(sizes) // 2 - 1],
    }


def _peak(known: int = 0) -> int:
    """The largest resident memory so far, in bytes; 0 if it is the ``known`` one, of before the measurement."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak if peak > known else 0


def main() -> None:
    """Run the named measurement."""
    torch.set_num_threads(1)
    name, *arguments = sys.argv[1:]
    measure = {"first_batch": first_batch, "order": order, "resume": resume, "million": million}[name]
    torch.zeros(1)  # the library is loaded before anything is measured
    print(json.dumps(measure(*arguments)))


if __name__ == "__main__":
    main()
