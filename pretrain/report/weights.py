"""The distribution of sample weights over the run."""

from __future__ import annotations

import math

from ..monitor.metrics import WEIGHT_BINS
from .plot import Figure
from .run import Run
from .series import sum_columns


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


def _bin_name(place: int) -> str:
    if place == 0:
        return f"below {WEIGHT_BINS[0]:.4g}"
    if place == len(WEIGHT_BINS):
        return f"{WEIGHT_BINS[-1]:.4g} and above"
    return f"{WEIGHT_BINS[place - 1]:.4g} to {WEIGHT_BINS[place]:.4g}"
