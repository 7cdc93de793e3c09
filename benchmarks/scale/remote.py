"""An epoch of the loader through a slow, failing http server, against the plain transfer of the same bytes."""

from __future__ import annotations

import hashlib
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


def measure_remote_epoch(dataset: Path, bandwidth: float) -> dict[str, Any]:
    """Both orders, a cold cache each.

    Returns:
        per order: seconds of the epoch, their ratio to the plain transfer's, seconds to open the data set before it,
        requests that failed, and whether every batch held the same tokens as read from the local disk.
    """
    shards = sorted(str(path.relative_to(dataset)) for path in dataset.glob("shards/*.tar"))
    with serving(dataset, bandwidth=bandwidth) as (url, _):
        began = time.perf_counter()
        transferred = sum(len(piece) for _, piece in plain(url, shards))
        transfer = time.perf_counter() - began
    orders = {}
    for mode in ("full", "windowed"):
        _, _, expected = _epoch(str(dataset), mode, None)
        with (
            serving(dataset, bandwidth=bandwidth, **FAULTS) as (url, counted),
            tempfile.TemporaryDirectory() as cache,
        ):
            opening, seconds, found = _epoch(url, mode, cache)
            faulty = counted()["faulty"]
        orders[mode] = {
            "seconds": seconds,
            "ratio": seconds / transfer,
            "seconds_to_open": opening,
            "faulty_answers": faulty,
            "equal": found == expected,
        }
    return {"bytes": transferred, "bandwidth": bandwidth, "transfer_seconds": transfer, "orders": orders}


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
