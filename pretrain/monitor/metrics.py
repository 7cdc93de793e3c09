"""``metrics.jsonl``: the single source for the progress line, TensorBoard and the report.

Three kinds of line, each with ``step`` (optimizer steps done when it was written) and ``time`` (Unix seconds):

=============  ======================================================================================================
step           ``position`` (sequences consumed), ``tokens`` (tokens consumed), ``loss`` (unweighted token mean over the
               global batch; of cross-entropy in nats), ``objective`` (what was differentiated), ``learning_rate``,
               ``grad_norm`` (global, before clipping), ``step_seconds`` (mean per step since the line before),
               ``tokens_per_second`` (all ranks), ``data_wait_seconds`` (per step), ``mfu`` (share of the peak, 0 to 1;
               absent when the peak is unknown), ``skipped`` and ``holes`` (optimizer steps skipped, sequences missing;
               both since the run began), ``domain_loss/NAME`` (as ``loss``), ``weights/...`` and whatever else a method
               counts
evaluation     ``evaluation`` (the set's name), ``position``, ``tokens`` (evaluated), ``heldout_holes`` (damaged
               sequences, left out of it; absent: none), ``heldout_damage`` (their blocks), ``loss`` (nats),
               ``perplexity``, ``bits_per_byte``, and these by domain that has sequences left: ``domain_loss/NAME``,
               ``domain_perplexity/NAME``, ...; of a loss that is no likelihood its own ``loss``, ``accuracy``,
               ``reciprocal_rank``, ``softmax_loss`` (nats)
event          ``event`` (its kind), ``message`` and anything that helps to explain it; ``damage`` has ``new_holes``
               (sequences that its step lost to one block): those of all lines sum to ``holes``
=============  ======================================================================================================

Sample weights are logged relative to uniform, that is multiplied by the size of the group over which they are
normalised: ``weights/min``, ``weights/max``, ``weights/ess`` (effective sample size (sum w)^2 / sum w^2 over the group
size, 0 to 1) and ``weights/histogram`` (:func:`weight_histogram`). Beside them stand ``weights/share/NAME`` and
``weights/uniform_share/NAME`` (a source's part of the weight, and what it would be with uniform weights),
``weights/loss_min`` and ``weights/loss_max`` (of the samples' mean losses, nats), ``weights/temperature`` (r),
``weights/dropped`` (sequences left out because their loss was not finite, since the run began) and
``weights/scoring_seconds`` (of the scoring passes, per step).

Of a model with experts, the keys below ``experts/`` say how a step's tokens were routed; :mod:`pretrain.expert_metrics`
lists them. Lists (``experts/load/N`` and ``experts/domain_load/N/NAME``, shares by expert of block N) are histograms in
TensorBoard, with a bin an expert.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import UserError
from data_pipeline.files import publish_bytes

from . import lines

MetricValue: TypeAlias = float | int | str | list[int] | list[float] | None
MetricLine: TypeAlias = Mapping[str, MetricValue]

METRICS_FILE = "metrics.jsonl"

WALL_CLOCK_FIELDS = (
    "time", "seconds", "step_seconds", "tokens_per_second", "data_wait_seconds", "mfu", "eta_seconds",
    "weights/scoring_seconds",
)  # fmt: skip
"""The fields that differ between two runs that are otherwise equal to the bit."""

WEIGHT_BINS: tuple[float, ...] = tuple(2.0 ** ((2 * k + 1) / 8) for k in range(-25, 25))
"""50 edges of quarter-octave bins of weight x group size, from 2^-6.125 to 2^6.125. The edges lie between the powers of
2^(1/4), so that the uniform weight 1 stands in the middle of a bin and rounding does not move it."""

_TOLD_AT_STARTS = ("data_change", "rollback")
"""Events that every start from a checkpoint tells of which they are to come next."""

_OLDER_NAMES = (("event", "holes", "new_holes"), ("evaluation", "holes", "heldout_holes"))
"""Of lines with the first key: what was written by versions that used one name for three counts, and its name now."""

_LEADING = ("event", "evaluation", "step", "position", "tokens", "loss", "objective", "learning_rate", "grad_norm")


def weight_histogram(relative_weights: Sequence[float] | npt.NDArray[np.floating[Any]]) -> list[int]:
    """Counts of ``relative_weights`` (weight x group size, any shape) in the bins of :data:`WEIGHT_BINS`.

    Returns ``len(WEIGHT_BINS) + 1`` counts: below the first edge, in each half-open bin [edge, next edge), and from the
    last edge on (NaN is counted there).
    """
    bins = np.searchsorted(WEIGHT_BINS, np.asarray(relative_weights, dtype=np.float64).ravel(), side="right")
    counts: list[int] = np.bincount(bins, minlength=len(WEIGHT_BINS) + 1).tolist()
    return counts


class MetricsLog:
    """Appends to ``RUN/metrics.jsonl``, after cutting off what lies beyond the checkpoint that is resumed from.

    ``resume_step`` is the number of optimizer steps the checkpoint holds; 0 is a fresh start and keeps nothing (a start
    that died before its first checkpoint may have left an evaluation of step 0, which is now repeated).
    ``evaluated`` says whether the checkpoint was saved after the evaluation of its step; if not, that one will be made
    again. What the starts from this checkpoint have accepted is told by those that accept it again. ``superseded``
    counts the lines cut off, a half-written last one included; ``lost_steps`` how many steps beyond the checkpoint they
    reached.

    Raises:
        UserError: the folder can't be written, or the file holds a damaged line (with its number).
    """

    def __init__(self, folder: Path, resume_step: int, evaluated: bool = True) -> None:
        self.path = folder / METRICS_FILE
        found = lines.read(self.path)
        steps = [_step_of(self.path, number, line) for number, line in enumerate(found.objects, start=1)]
        kept = [
            text
            for step, line, text in zip(steps, found.objects, found.texts, strict=True)
            if 0 < resume_step >= step and (step < resume_step or not _is_told_again(line, evaluated))
        ]
        self.superseded = len(found.texts) + found.interrupted - len(kept)
        self.lost_steps = max([0, *(step - resume_step for step in steps)])
        content = b"".join(kept)
        try:
            if not self.path.exists() or self.path.read_bytes() != content:
                publish_bytes(self.path, content)
        except OSError as error:
            raise UserError(
                f"{self.path} can't be written: {error.strerror or error}. Choose another run.folder or mend it."
            ) from error

    def flush(self) -> None:
        """Put what was written on the disk, before a checkpoint that counts on it."""
        with open(self.path, "rb") as handle:
            os.fsync(handle.fileno())

    def write(self, line: MetricLine) -> None:
        """Append one line and hand it to the operating system, so that it survives the death of this process.

        Raises:
            ValueError: the line has no whole-numbered ``step``, without which a resume could not cut it off.
            OSError: the disk is full; the file is left as it was.
        """
        if type(line.get("step")) is not int:
            raise ValueError(f"a metric line needs a whole-numbered 'step', got {line.get('step')!r}")
        lines.append(self.path, lines.encode(dict(line), _LEADING), durable=False)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``folder/metrics.jsonl`` in order; a half-written last line is left out, no file is no lines.

    Names that older versions wrote are given as they are now.

    Raises:
        UserError: any other line is damaged (the message has its number).
    """
    found = lines.read(folder / METRICS_FILE).objects
    for line in found:
        for kind, old, new in _OLDER_NAMES:
            if kind in line and old in line:
                line[new] = line.pop(old)
    return found


def _is_told_again(line: dict[str, Any], evaluated: bool) -> bool:
    """Whether a line of the checkpoint's own step was written after the checkpoint."""
    return ("evaluation" in line and not evaluated) or line.get("event") in _TOLD_AT_STARTS


def _step_of(path: Path, number: int, line: dict[str, Any]) -> int:
    step = line.get("step")
    if type(step) is not int:
        raise UserError(
            f"{path}, line {number}: has no whole-numbered 'step' (found {step!r}), so it can't be told "
            "whether a resume keeps it. Mend or delete that line."
        )
    return step
