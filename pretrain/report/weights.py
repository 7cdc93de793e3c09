"""How samples were weighed over the run: the weights' distribution, who got them, and the losses they follow from."""

from __future__ import annotations

import math

from ..monitor.metrics import WEIGHT_BINS
from .plot import SMOOTHED_FROM, Figure, colour, curve, y_axis
from .run import Run
from .series import half_life, smooth, sum_columns


def weights_figure(run: Run) -> Figure | None:
    """Heat map [weight bin, column of steps] of the share of samples in percent, on a log2 axis."""
    bins = len(WEIGHT_BINS) + 1
    lines = [line for line in run.steps if len(line.get("weights/histogram") or ()) == bins]
    lines = [line for line in lines if sum(line["weights/histogram"])]
    if not lines:
        return None
    edges, sums = sum_columns([line["step"] for line in lines], [line["weights/histogram"] for line in lines])
    used = [place for place in range(bins) if any(counts[place] for counts in sums)]
    low, high = max(0, min(used) - 1), min(bins - 1, max(used) + 1)
    octaves = [math.log2(edge) for edge in WEIGHT_BINS]
    step = octaves[1] - octaves[0]
    sides = [octaves[0] - step, *octaves, octaves[-1] + step]
    names = [_bin_name(place) for place in range(low, high + 1)]
    share = [[100 * counts[place] / sum(counts) for counts in sums] for place in range(low, high + 1)]
    heat = {
        "type": "heatmap",
        "x": edges,
        "y": sides[low : high + 2],
        "z": [[value or None for value in row] for row in share],
        "customdata": [[name] * len(sums) for name in names],
        "zmin": 0,
        "colorscale": [[0, "@heat-low"], [0.3, "@heat-middle"], [1, "@heat-high"]],
        "colorbar": {"title": {"text": "% of samples", "side": "right"}, "thickness": 8, "outlinewidth": 0},
        "hoverongaps": False,
        "hovertemplate": "step %{x:,.0f}<br>weight %{customdata}<br>%{z:.6~g}% of samples<extra></extra>",
    }
    ticks = range(math.ceil(sides[low]), math.floor(sides[high + 1]) + 1)
    axis = {
        "title": {"text": "weight × group size"},
        "tickvals": list(ticks),
        "ticktext": [f"{2**octave}" if octave >= 0 else f"1/{2**-octave}" for octave in ticks],
    }
    note = "Share of samples by weight relative to uniform (1 is uniform), on a logarithmic scale."
    return Figure("weights", "Sample weights", [heat], {"yaxis": axis, "hovermode": "closest"}, note, section="weights")


def shares_figure(run: Run) -> Figure | None:
    """A line for each domain: its part of the weight; dotted: the part it would have with uniform weights."""
    traces, smoothed = [], ""
    for place, name in enumerate(run.names("domain_loss/")):
        for key, dash in ((f"weights/share/{name}", "solid"), (f"weights/uniform_share/{name}", "dot")):
            steps, values = run.column(key)
            values = [100 * value for value in values]
            if len(values) >= SMOOTHED_FROM:
                values, smoothed = smooth(values, half_life(len(values))), " Smoothed as above."
            label = name if dash == "solid" else f"{name}, uniform"
            traces += [curve(label, steps, values, colour(place), dash=dash)] if values else []
    layout = {"yaxis": {"title": {"text": "% of the weight"}, "rangemode": "tozero", "ticksuffix": "%"}}
    note = f"Dotted: with uniform weights.{smoothed}"
    return Figure("weight_shares", "Weight by domain", traces, layout, note, section="weights") if traces else None


def loss_range_figure(run: Run) -> Figure | None:
    """The lowest and the highest mean loss of a step's sequences."""
    ends = [(name, run.column(f"weights/loss_{key}")) for name, key in (("highest", "max"), ("lowest", "min"))]
    traces = [curve(name, *column, colour(place)) for place, (name, column) in enumerate(ends) if column[1]]
    note = "Mean losses of the sequences of a step."
    return (
        Figure("loss_range", "Loss range", traces, y_axis(run.loss_unit), note, section="weights") if traces else None
    )


def temperature_figure(run: Run) -> Figure | None:
    """r, where it changed."""
    steps, values = run.column("weights/temperature")
    if len(set(values)) < 2:
        return None
    layout = {"yaxis": {"title": {"text": "r"}, "type": "log", "dtick": "D2", "tickformat": "~g"}}
    traces = [curve("temperature", steps, values, colour(0))]
    return Figure("temperature", "Temperature of reweighting", traces, layout, section="weights")


def _bin_name(place: int) -> str:
    if place == 0:
        return f"below {WEIGHT_BINS[0]:.4g}"
    if place == len(WEIGHT_BINS):
        return f"{WEIGHT_BINS[-1]:.4g} and above"
    return f"{WEIGHT_BINS[place - 1]:.4g} to {WEIGHT_BINS[place]:.4g}"
