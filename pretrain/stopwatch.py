"""Seconds that work on a device takes, without making the host wait for it."""

from __future__ import annotations

import time
from types import TracebackType

import torch


class Stopwatch:
    """Measures what is started inside a ``with`` block; on a GPU until it is done there, not until it is launched."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events = [torch.Event(device, enable_timing=True) for _ in range(2)] if self._on_gpu else []
        self._times = [0.0, 0.0]

    def __enter__(self) -> Stopwatch:
        self._mark(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mark(1)

    def _mark(self, end: int) -> None:
        if self._on_gpu:
            self._events[end].record()
        self._times[end] = time.perf_counter()

    def seconds(self) -> float:
        """Of the last block; on a GPU the host has to have waited for something later."""
        if self._on_gpu:
            return float(self._events[0].elapsed_time(self._events[1])) / 1000.0
        return self._times[1] - self._times[0]
