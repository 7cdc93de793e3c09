"""The plots of the page as Plotly figures (https://plotly.com/javascript/reference/), in plain dictionaries."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import cycle

from ..monitor.metrics import WEIGHT_BINS
from .plot import SMOOTHED_FROM, Figure, colour, curve, marks, step_range, y_axis
from .run import Run, column
from .series import half_life, smooth, sum_columns

# What the fixed plots and the headline show; any other number of a step line gets a plot of its own.
_SHOWN = {
    "step", "time", "position", "tokens", "loss", "objective", "learning_rate", "grad_norm", "step_seconds",
    "tokens_per_second", "data_wait_seconds", "mfu", "skipped", "holes", "weights/ess", "weights/min", "weights/max",
}  # fmt: skip


def make_figures(run: Run) -> list[Figure]:
    """Every plot for which the run has data, in reading order."""
    figures = [_loss(run), _heldout(run), _domains(run), _learning_rate(run), _grad_norm(run), _objective(run)]
    figures += [_weights(run), _effective_sample_size(run)]
    figures += [_throughput(run), _data_wait(run), _mfu(run), *_others(run)]
    drawn = [figure for figure in figures if figure is not None]
    for figure in drawn:
        figure.layout.setdefault("shapes", marks(run))
        figure.layout.setdefault("xaxis", {}).update(title={"text": "optimizer step"}, range=step_range(run))
    return drawn


def _loss(run: Run) -> Figure | None:
    steps, values = run.column("loss")
    evaluations = sorted({line["evaluation"] for line in run.evaluations})
    traces, note = [], ""
    if values:
        few = len(values) < SMOOTHED_FROM
        traces.append(curve("train" if few else "train, every line", steps, values, "@series-1" if few else "@faint-1"))
        if not few:
            life = half_life(len(values))
            traces.append(curve("train, smoothed", steps, smooth(values, life), "@series-1", width=2))
            note = f"Smoothed: exponential mean with a half-life of {life:,} {'line' if life == 1 else 'lines'}."
        lost = sum(not math.isfinite(value) for value in values)
        note += f" {lost:,} lines with a non-finite loss are gaps." if lost else ""
    for place, name in enumerate(evaluations, start=1):
        lines = [line for line in run.evaluations if line["evaluation"] == name]
        traces.append(curve(name, *column(lines, "loss"), colour(place), markers=True))
    if not traces:
        return None
    layout = {**y_axis("nats per token"), "shapes": marks(run, labels=True)}
    return Figure("loss", "Loss", traces, layout, note.strip(), wide=True)


def _heldout(run: Run) -> Figure | None:
    """A colour for each domain, a dash for each set; bits per byte where the run has them, else the loss."""
    evaluations = sorted({line["evaluation"] for line in run.evaluations})
    for prefix, unit in (("domain_bits_per_byte/", "bits per byte"), ("domain_loss/", "nats per token")):
        traces = []
        for dash, evaluation in zip(cycle(("solid", "dash", "dot")), evaluations, strict=False):
            lines = [line for line in run.evaluations if line["evaluation"] == evaluation]
            for place, domain in enumerate(run.names("domain_loss/")):
                steps, values = column(lines, prefix + domain)
                name = domain if len(evaluations) == 1 else f"{evaluation}: {domain}"
                traces += [curve(name, steps, values, colour(place), markers=True, dash=dash)] if values else []
        if traces:
            return Figure("heldout", "Held-out by domain", traces, y_axis(unit))
    return None


def _domains(run: Run) -> Figure | None:
    traces, note = [], ""
    for place, name in enumerate(run.names("domain_loss/")):
        steps, values = run.column(f"domain_loss/{name}")
        if len(values) >= SMOOTHED_FROM:
            life = half_life(len(values))
            values, note = smooth(values, life), "Smoothed as above."
        traces += [curve(name, steps, values, colour(place))] if values else []
    return Figure("domains", "Training loss by domain", traces, y_axis("nats per token"), note) if traces else None


def _objective(run: Run) -> Figure | None:
    """What was differentiated, unless it was the loss itself."""
    if all(line.get("objective") == line.get("loss") for line in run.steps):
        return None
    return _single(run, "objective", "objective", "Objective", "nats", note="What was differentiated.")


def _learning_rate(run: Run) -> Figure | None:
    return _single(run, "learning_rate", "learning_rate", "Learning rate", "learning rate", tozero=True)


def _grad_norm(run: Run) -> Figure | None:
    figure = _single(run, "grad_norm", "grad_norm", "Gradient norm", "L2 norm before clipping")
    if figure:
        figure.layout["yaxis"].update(type="log", dtick="D2", tickformat="~g")
    return figure


def _weights(run: Run) -> Figure | None:
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


def _effective_sample_size(run: Run) -> Figure | None:
    figure = _single(run, "ess", "weights/ess", "Effective sample size", "% of the group", scale=100)
    if figure:
        figure.layout["yaxis"].update(range=[0, 103], ticksuffix="%")
        figure.data[0]["name"] = "effective sample size"
        return replace(figure, section="weights", note="(Σw)² / Σw² over the group's size.")
    return None


def _throughput(run: Run) -> Figure | None:
    figure = _single(run, "throughput", "tokens_per_second", "Throughput", "tokens/s, all ranks", "speed", tozero=True)
    if figure:
        figure.layout["yaxis"].update(tickformat="~s")
    return figure


def _data_wait(run: Run) -> Figure | None:
    """The wait for data as a share of the step, in percent."""
    lines = [
        {"step": line["step"], "wait": 100 * line["data_wait_seconds"] / line["step_seconds"]}
        for line in run.steps
        if isinstance(line.get("data_wait_seconds"), int | float) and line.get("step_seconds")
    ]
    if not lines:
        return None
    layout = y_axis("% of the step")
    layout["yaxis"].update(rangemode="tozero", ticksuffix="%")
    steps, values = column(lines, "wait")
    return Figure("data_wait", "Data wait", [curve("data wait", steps, values, "@series-1")], layout, section="speed")


def _mfu(run: Run) -> Figure | None:
    figure = _single(run, "mfu", "mfu", "Model FLOPs utilisation", "% of the peak", "speed", scale=100, tozero=True)
    if figure:
        figure.layout["yaxis"].update(ticksuffix="%")
    return figure


def _others(run: Run) -> list[Figure]:
    """A plot for every further group of numbers: ``experts/...`` in one plot, names without a slash alone."""
    keys = {key for line in run.steps for key, value in line.items() if isinstance(value, int | float)}
    groups: dict[str, list[str]] = {}
    for key in sorted(keys - _SHOWN):
        if not key.startswith("domain_loss/"):
            groups.setdefault(key.rpartition("/")[0] or key, []).append(key)
    figures = []
    for number, (group, members) in enumerate(groups.items()):
        traces = [curve(key, *run.column(key), colour(place)) for place, key in enumerate(members)]
        figures.append(Figure(f"other_{number}", group, traces, {"yaxis": {}}, section="others"))
    return figures


def _single(
    run: Run, id: str, key: str, title: str, unit: str, section: str = "training", *, scale: float = 1.0,
    tozero: bool = False, note: str = "",
) -> Figure | None:  # fmt: skip
    steps, values = run.column(key)
    if not values:
        return None
    layout = y_axis(unit)
    if tozero:
        layout["yaxis"]["rangemode"] = "tozero"
    scaled = [value * scale for value in values] if scale != 1 else values
    return Figure(id, title, [curve(title.lower(), steps, scaled, "@series-1")], layout, note, section=section)
