"""What a run writes about itself: metrics, attempts, TensorBoard, the progress line; and the peak under MFU."""

from .attempts import Attempt, AttemptsLog, Reason, read_attempts
from .flops import peak_flops
from .metrics import (
    WALL_CLOCK_FIELDS,
    WEIGHT_BINS,
    MetricLine,
    MetricsLog,
    MetricValue,
    read_metrics,
    weight_histogram,
)
from .monitor import Monitor
from .progress import evaluation_line, progress_line
from .tensorboard import TensorBoardWriter

__all__ = [
    "WALL_CLOCK_FIELDS",
    "WEIGHT_BINS",
    "Attempt",
    "AttemptsLog",
    "MetricLine",
    "MetricValue",
    "MetricsLog",
    "Monitor",
    "Reason",
    "TensorBoardWriter",
    "evaluation_line",
    "peak_flops",
    "progress_line",
    "read_attempts",
    "read_metrics",
    "weight_histogram",
]
