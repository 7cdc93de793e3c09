"""An epoch of the loader through a slow, failing http server, against the plain transfer of the same bytes."""

from __future__ import annotations

import hashlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from remote_cost import FAULTS, plain, serving

from data_pipeline import BatchPlan, Order, OrderSource, StepLoader, TokenSource
from data_pipeline.settings import build_settings
from data_pipeline.storage import StorageSettings
from data_pipeline.windows import Windows

_SEQ_LEN, _BATCH, _WINDOW = 4096, 8, 256


def measure_remote_epoch(dataset: Path, bandwidth: float, rounds: int) -> dict[str, Any]:
    """Both orders, a cold cache each; medians over the rounds.

    Returns:
        per order: seconds of the epoch, their ratio to the plain transfer's, seconds to open the data set before it,
        requests that failed, and whether every batch held the same tokens as read from the local disk.
    """
    shards = sorted(str(path.relative_to(dataset)) for path in dataset.glob("shards/*.tar"))
    transfers: list[float] = []
    reads: dict[str, list[dict[str, Any]]] = {"full": [], "windowed": []}
    expected = {mode: _epoch(str(dataset), mode, None)[2] for mode in reads}
    for number in range(rounds):
        with serving(dataset, bandwidth=bandwidth) as (url, _):
            began = time.perf_counter()
            transferred = sum(len(piece) for _, piece in plain(url, shards))
            transfers.append(time.perf_counter() - began)
        for mode, done in reads.items():
            with (
                serving(dataset, bandwidth=bandwidth, seed=number, **FAULTS) as (url, counted),
                tempfile.TemporaryDirectory() as cache,
            ):
                opening, seconds, found = _epoch(url, mode, cache)
                faulty = counted()["faulty"]
            done.append({"open": opening, "seconds": seconds, "faulty": faulty, "equal": found == expected[mode]})
    transfer = statistics.median(transfers)
    orders = {
        mode: {
            "seconds": [read["seconds"] for read in done],
            "ratio": statistics.median(read["seconds"] for read in done) / transfer,
            "seconds_to_open": statistics.median(read["open"] for read in done),
            "faulty_answers": sum(read["faulty"] for read in done),
            "equal": all(read["equal"] for read in done),
        }
        for mode, done in reads.items()
    }
    return {"bytes": transferred, "bandwidth": bandwidth, "transfer_seconds": transfers, "orders": orders}


def _epoch(root: str, mode: str, cache: str | None) -> tuple[float, float, str]:
    """Seconds to open, seconds of the epoch, and the hash of all its batches in order."""
    storage = build_settings(StorageSettings, {"cache": {"folder": cache}}, "benchmark")
    digest = hashlib.sha256()
    began = time.perf_counter()
    with TokenSource(root, None, "train", _SEQ_LEN, storage=storage) as source:
        opened = time.perf_counter()
        members = [OrderSource("text", source.sequences)]
        windows = Windows(_BATCH, _WINDOW) if mode == "windowed" else None
        loader = StepLoader(
            Order(0, members, mode="windowed", windows=windows) if windows else Order(0, members),
            [source],
            rank=0,
            world_size=1,
            micro_batch=_BATCH,
            plan=BatchPlan(_BATCH),
            seq_len=_SEQ_LEN,
            start_step=0,
            start_position=0,
            end_step=source.sequences // _BATCH,
        )
        with loader:
            for step in loader:
                digest.update(step.micro_batches[0].rows.numpy().data)
        return opened - began, time.perf_counter() - opened, digest.hexdigest()
