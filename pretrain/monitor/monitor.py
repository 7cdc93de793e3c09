"""What rank 0 calls once a logged step: file, TensorBoard and terminal say the same."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from pretrain.terminal import lost_output

from .metrics import MetricLine, MetricsLog
from .progress import evaluation_line, progress_line
from .tensorboard import TensorBoardWriter


class Monitor:
    """Hands every line to ``metrics.jsonl``, to TensorBoard when it is on, and, in words, to ``print``.

    ``superseded`` and ``lost_steps`` say what opening the log at ``resume_step`` has cut off.

    Raises:
        UserError: the run folder can't be written, or its metrics hold a damaged line.
    """

    def __init__(
        self,
        run_folder: Path,
        resume_step: int,
        total_steps: int,
        tensorboard: bool,
        evaluated: bool = True,
        print: Callable[[str], object] = print,
    ) -> None:
        self._metrics = MetricsLog(run_folder, resume_step, evaluated)
        self._tensorboard = TensorBoardWriter(run_folder, resume_step) if tensorboard else None
        self._total_steps = total_steps
        self._print = print
        self._lost = ""
        self._recent: deque[float] = deque(maxlen=50)
        self.superseded = self._metrics.superseded
        self.lost_steps = self._metrics.lost_steps

    def log(self, line: MetricLine) -> None:
        """One logged step. The remaining time is told by the median of the last 50 lines' ``step_seconds``. Output that
        nobody takes any more is an event."""
        self._write(line)
        if isinstance(seconds := line.get("step_seconds"), int | float):
            self._recent.append(seconds)
        pace = statistics.median(self._recent) if self._recent else None
        self._print(progress_line(line, self._total_steps, pace))
        if (lost := lost_output()) and lost != self._lost:
            self._lost = lost
            told = f"{lost}: what the run says is in metrics.jsonl from here on"
            self.event({"event": "output_lost", "step": line["step"], "message": told})

    def evaluation(self, line: MetricLine) -> None:
        """One evaluation; in TensorBoard its numbers stand under the set's name."""
        self._write(line, prefix=f"{line['evaluation']}/")
        self._print(evaluation_line(line))

    def event(self, line: MetricLine) -> None:
        """One incident: into the file, TensorBoard (as text) and the terminal."""
        self._metrics.write({"time": time.time(), **line})
        details = [f"{key}={value}" for key, value in line.items() if key not in ("event", "step", "message")]
        message = [str(line["message"])] if line.get("message") else []
        told = " ".join(message + details)
        if self._tensorboard:
            step = line["step"]
            assert isinstance(step, int)
            self._tensorboard.event(str(line["event"]), told, step)
        self._print(f"step {line['step']:,}: {line['event']}: {told}".rstrip(": "))

    def flush(self) -> None:
        """Put the metrics on the disk, before a checkpoint that counts on them."""
        self._metrics.flush()

    def close(self) -> None:
        """Flush TensorBoard; the metrics file is always flushed."""
        if self._tensorboard:
            self._tensorboard.close()

    def _write(self, line: MetricLine, prefix: str = "") -> None:
        self._metrics.write({"time": time.time(), **line})
        if self._tensorboard:
            self._tensorboard.write(line, prefix)
