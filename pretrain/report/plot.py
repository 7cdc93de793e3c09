"""What the figures are made of: lines, axes and vertical marks, in Plotly's words.

A colour is written ``"@name"``: the page replaces it by its CSS variable ``--name``, so that a plot follows the light
or dark theme. What comes from the run is escaped, because Plotly reads markup in names.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from .run import Run
from .series import half_life, smooth, thin

SERIES_COLOURS = 8
SMOOTHED_FROM = 40
"""Curves of fewer points are drawn as they are, with a dot for every point."""
NOISY_FROM = 500
"""Plots of one measured quantity are smoothed from this many points on."""
MARKS = 200
LABELLED_MARKS = 8

Column: TypeAlias = tuple[list[int], list[float]]
"""Steps [n] and values [n]."""


@dataclass(frozen=True)
class Figure:
    """One plot: ``note`` is a sentence under the title, ``wide`` takes the page's whole width, ``stepwise`` has the
    steps on its horizontal axis and follows the others' zoom."""

    id: str
    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    note: str = ""
    wide: bool = False
    section: str = field(default="training", kw_only=True)
    stepwise: bool = field(default=True, kw_only=True)


def curve(
    name: str,
    steps: Sequence[int],
    values: Sequence[float],
    colour: str,
    *,
    width: float = 1.25,
    markers: bool = False,
    dash: str = "solid",
) -> dict[str, Any]:
    """A line over the steps, thinned; a non-finite value is a gap, ``markers`` dots every point of a sparse curve."""
    steps, values = thin(steps, values)
    return {
        "type": "scatter",
        "name": html.escape(name),
        "x": steps,
        "y": [value if math.isfinite(value) else None for value in values],
        "mode": "lines+markers" if markers or len(values) < SMOOTHED_FROM else "lines",
        "line": {"color": colour, "width": 1.75 if markers else width, "dash": dash},
        "marker": {"color": colour, "size": 5},
    }


def noisy(
    id: str, title: str, values: Column, unit: str, axis: dict[str, Any], section: str = "training", note: str = ""
) -> Figure | None:
    """One measured quantity; a long curve, whose noise would fill the plot, is drawn smoothed over a faint raw one."""
    if not values[1]:
        return None
    traces = raw_and_smooth(title.lower(), *values, NOISY_FROM)
    if len(traces) > 1:
        note = f"{note} Smoothed as above.".strip()
    return Figure(id, title, traces, {"yaxis": {"title": {"text": unit}, **axis}}, note, section=section)


def raw_and_smooth(name: str, steps: Sequence[int], values: Sequence[float], from_points: int) -> list[dict[str, Any]]:
    """A curve of fewer points than ``from_points`` as it is; a longer one smoothed over itself."""
    if len(values) < from_points:
        return [curve(name, steps, values, "@series-1")]
    smoothed = smooth(values, half_life(len(values)))
    return [
        curve(f"{name}, every line", steps, values, "@faint-1"),
        curve(f"{name}, smoothed", steps, smoothed, "@series-1", width=2),
    ]


def y_axis(unit: str) -> dict[str, Any]:
    """A layout whose vertical axis says ``unit``."""
    return {"yaxis": {"title": {"text": unit}}}


def colour(place: int) -> str:
    """The colour of the ``place``-th of several curves: a domain has the same one in every plot."""
    return f"@series-{place % SERIES_COLOURS + 1}"


def step_axis(run: Run) -> dict[str, Any]:
    """The horizontal axis that all plots share: optimizer steps, never fractions of one."""
    pad = max(0.5, run.last_step / 100)
    axis: dict[str, Any] = {"title": {"text": "optimizer step"}, "range": [-pad, run.last_step + pad]}
    return {**axis, "dtick": 1} if run.last_step < 10 else axis


def marks(run: Run, *, labels: bool = False) -> list[dict[str, Any]]:
    """A dashed line at every resume and a dotted red one at every incident."""
    resumes = run.resumes[-MARKS:]
    drawn = []
    for step, attempt in resumes:
        mark = _mark(step, "@mark", "dash")
        if labels and len(resumes) <= LABELLED_MARKS:
            font = {"size": 10, "color": "@muted"}
            text = str(attempt.number)
            mark["label"] = {"text": text, "textposition": "end", "textangle": 0, "xanchor": "left", "yanchor": "top"}
            mark["label"]["font"] = font
        drawn.append(mark)
    return drawn + [_mark(line["step"], "@alarm", "dot") for line in run.events[-MARKS:]]


def _mark(step: int, colour: str, dash: str) -> dict[str, Any]:
    line = {"color": colour, "width": 1, "dash": dash}
    return {"type": "line", "x0": step, "x1": step, "y0": 0, "y1": 1, "yref": "paper", "layer": "below", "line": line}
