"""Curves with intervals, as one page of Plotly plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plotly import graph_objects, io

from .statistics import Interval


@dataclass(frozen=True)
class Curve:
    """Points with error bars; ``error`` is half an interval each."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    dash: str = "solid"
    colour: int | None = None
    """Its place in the palette; None takes the next."""

    @classmethod
    def of(cls, name: str, x: Sequence[float], values: Sequence[Interval], colour: int | None = None) -> Curve:
        """Means with their intervals."""
        return cls(name, x, [value.mean for value in values], [value.half for value in values], colour=colour)


@dataclass(frozen=True)
class Plot:
    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    log_x: bool = False
    log_y: bool = False


def write_plots(path: Path, plots: Sequence[Plot]) -> None:
    """One page that needs no network."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [
        io.to_html(figure(plot), full_html=False, include_plotlyjs=number == 0) for number, plot in enumerate(plots)
    ]
    path.write_text("<!doctype html>\n<meta charset='utf-8'>\n" + "\n".join(parts))


def figure(plot: Plot) -> graph_objects.Figure:
    """The plot in Plotly's form."""
    drawn = graph_objects.Figure()
    palette = io.templates[io.templates.default].layout.colorway
    for place, curve in enumerate(plot.curves):
        colour = palette[(place if curve.colour is None else curve.colour) % len(palette)]
        drawn.add_scatter(
            x=list(curve.x),
            y=list(curve.y),
            name=curve.name,
            mode="lines+markers",
            line={"dash": curve.dash, "color": colour},
            error_y=None if curve.error is None else {"type": "data", "array": list(curve.error)},
        )
    drawn.update_layout(title=plot.title, xaxis_title=plot.x, yaxis_title=plot.y)
    drawn.update_xaxes(type="log" if plot.log_x else "linear")
    drawn.update_yaxes(type="log" if plot.log_y else "linear")
    return drawn
