"""The metric lines as TensorBoard scalars and histograms, under their own names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from .metrics import WEIGHT_BINS, MetricLine

_NOT_SCALARS = ("step", "time")


class TensorBoardWriter:
    """Writes to ``RUN/tensorboard``; on a resume TensorBoard hides what lay beyond ``resume_step``.

    Raises:
        OSError: the folder can't be written.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        # imported here: the report reads metrics on login nodes, where importing torch takes seconds
        from torch.utils.tensorboard import SummaryWriter

        purge = resume_step + 1 if resume_step > 0 else 0
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def write(self, line: MetricLine, prefix: str = "") -> None:
        """Every number of ``line`` as a scalar at its step, every list as a histogram: ``weights/histogram`` over the
        weight, shares of experts over the expert's number."""
        step = line["step"]
        for key, value in line.items():
            if isinstance(value, list) and value:
                self._histogram(prefix + key, value, step, *_bins(key, len(value)))
            elif isinstance(value, int | float) and key not in _NOT_SCALARS:
                self._writer.add_scalar(prefix + key, value, step)

    def event(self, kind: str, message: str, step: int) -> None:
        """An incident, as text under ``events/KIND``."""
        self._writer.add_text(f"events/{kind}", message, step)

    def _histogram(
        self,
        tag: str,
        counts: Sequence[float],
        step: object,
        lowest: float,
        limits: Sequence[float],
        middles: Sequence[float],
    ) -> None:
        # The sums are of the bins' middles: TensorBoard shows them nowhere but in its own record.
        self._writer.add_histogram_raw(
            tag,
            min=lowest,
            max=limits[-1],
            num=sum(counts),
            sum=sum(count * middle for count, middle in zip(counts, middles, strict=True)),
            sum_squares=sum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
            bucket_limits=limits,
            bucket_counts=list(counts),
            global_step=step,
        )

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def _bins(key: str, count: int) -> tuple[float, Sequence[float], Sequence[float]]:
    """Of a list's histogram: its lower end, its bins' upper ends and their middles."""
    if key != "weights/histogram":  # one bin an expert
        return -0.5, [number + 0.5 for number in range(count)], range(count)
    ratio = WEIGHT_BINS[1] / WEIGHT_BINS[0]
    limits = [*WEIGHT_BINS, WEIGHT_BINS[-1] * ratio]
    middles = [limit / math.sqrt(ratio) for limit in limits]
    return middles[0], limits, middles
