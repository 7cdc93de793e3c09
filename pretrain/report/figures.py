"""The plots of the page as Plotly figures (https://plotly.com/javascript/reference/), in plain dictionaries."""

from __future__ import annotations

import math
from itertools import cycle

from .experts import SHOWN, expert_figures
from .plot import SMOOTHED_FROM, Column, Figure, colour, curve, marks, noisy, raw_and_smooth, step_axis, y_axis
from .run import Run, column
from .series import half_life, smooth
from .weights import loss_range_figure, shares_figure, temperature_figure, weights_figure

# What the fixed plots and the headline show; any other number of a step line gets a plot of its own.
_SHOWN = {
    "step", "time", "position", "tokens", "loss", "objective", "learning_rate", "grad_norm", "step_seconds",
    "tokens_per_second", "data_wait_seconds", "mfu", "skipped", "holes", "weights/ess", "weights/min", "weights/max",
    "weights/loss_min", "weights/loss_max", "weights/temperature", "weights/dropped", "weights/scoring_seconds",
}  # fmt: skip

_PARTS = (
    ("data_wait", "Data wait", "data_wait_seconds"),
    ("scoring", "Scoring pass of reweighting", "weights/scoring_seconds"),
)


def make_figures(run: Run) -> list[Figure]:
    """Every plot for which the run has data, in reading order."""
    training = [
        _loss(run),
        _heldout(run),
        _ranks(run),
        _domains(run),
        _learning_rate(run),
        _grad_norm(run),
        _objective(run),
    ]
    weights = [weights_figure(run), _effective_sample_size(run), shares_figure(run), loss_range_figure(run)]
    weights.append(temperature_figure(run))
    speed = [_throughput(run), *(_part_of_step(run, *part) for part in _PARTS), _mfu(run)]
    experts = expert_figures(run)
    drawn = [figure for figure in (*training, *weights, *experts, *speed, *_others(run)) if figure is not None]
    for figure in drawn:
        if figure.stepwise:
            figure.layout.setdefault("shapes", marks(run))
            figure.layout["xaxis"] = step_axis(run)
    return drawn


def _loss(run: Run) -> Figure | None:
    steps, values = run.column("loss")
    evaluations = sorted({line["evaluation"] for line in run.evaluations})
    traces, note = [], ""
    if values:
        traces += raw_and_smooth("train", steps, values, SMOOTHED_FROM)
        if len(traces) > 1:
            life = half_life(len(values))
            note = f"Smoothed: exponential mean with a half-life of {life:,} {'line' if life == 1 else 'lines'}."
        lost = sum(not math.isfinite(value) for value in values)
        note += f" {lost:,} lines with a non-finite loss are gaps." if lost else ""
    for place, name in enumerate(evaluations, start=1):
        lines = [line for line in run.evaluations if line["evaluation"] == name]
        traces.append(curve(name, *column(lines, "loss"), colour(place), markers=True))
    if not traces:
        return None
    layout = {**y_axis(f"{run.loss_unit} per token"), "shapes": marks(run, labels=True)}
    return Figure("loss", "Loss", traces, layout, note.strip(), wide=True)


def _heldout(run: Run) -> Figure | None:
    """A colour for each domain, a dash for each set; bits per byte where the run has them, else the loss."""
    evaluations = sorted({line["evaluation"] for line in run.evaluations})
    for prefix, unit in (("domain_bits_per_byte/", "bits per byte"), ("domain_loss/", f"{run.loss_unit} per token")):
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


def _ranks(run: Run) -> Figure | None:
    """How the labels rank among all tokens, of a loss that is no likelihood."""
    traces = []
    for place, (key, name) in enumerate((("accuracy", "share ranked first"), ("reciprocal_rank", "mean of 1 / rank"))):
        steps, values = column(run.evaluations, key)
        traces += [curve(name, steps, values, colour(place), markers=True)] if values else []
    return Figure("ranks", "Held-out ranks", traces, {"yaxis": {"rangemode": "tozero"}}) if traces else None


def _domains(run: Run) -> Figure | None:
    traces, note = [], ""
    for place, name in enumerate(run.names("domain_loss/")):
        steps, values = run.column(f"domain_loss/{name}")
        if len(values) >= SMOOTHED_FROM:
            life = half_life(len(values))
            values, note = smooth(values, life), "Smoothed as above."
        traces += [curve(name, steps, values, colour(place))] if values else []
    return (
        Figure("domains", "Training loss by domain", traces, y_axis(f"{run.loss_unit} per token"), note)
        if traces
        else None
    )


def _learning_rate(run: Run) -> Figure | None:
    steps, values = run.column("learning_rate")
    if not values:
        return None
    layout = {"yaxis": {"title": {"text": "learning rate"}, "rangemode": "tozero"}}
    return Figure("learning_rate", "Learning rate", [curve("learning rate", steps, values, "@series-1")], layout)


def _grad_norm(run: Run) -> Figure | None:
    axis = {"type": "log", "dtick": "D2", "tickformat": "~g"}
    return noisy("grad_norm", "Gradient norm", run.column("grad_norm"), "L2 norm before clipping", axis)


def _objective(run: Run) -> Figure | None:
    """What was differentiated, unless it was the loss itself."""
    if all(line.get("objective") == line.get("loss") for line in run.steps):
        return None
    return noisy("objective", "Objective", run.column("objective"), run.loss_unit, {}, note="What was differentiated.")


def _effective_sample_size(run: Run) -> Figure | None:
    axis, note = {"range": [0, 103], "ticksuffix": "%"}, "(Σw)² / Σw² over the group's size."
    values = _percent(run.column("weights/ess"))
    return noisy("ess", "Effective sample size", values, "% of the group", axis, "weights", note)


def _throughput(run: Run) -> Figure | None:
    axis, values = {"rangemode": "tozero", "tickformat": "~s"}, run.column("tokens_per_second")
    return noisy("throughput", "Throughput", values, "tokens/s, all ranks", axis, "speed")


def _part_of_step(run: Run, id: str, title: str, key: str) -> Figure | None:
    """Seconds of a step as a share of it, in percent."""
    lines = [
        {"step": line["step"], "part": line[key] / line["step_seconds"]}
        for line in run.steps
        if isinstance(line.get(key), int | float) and line.get("step_seconds")
    ]
    axis = {"rangemode": "tozero", "ticksuffix": "%"}
    return noisy(id, title, _percent(column(lines, "part")), "% of the step", axis, "speed")


def _mfu(run: Run) -> Figure | None:
    axis, values = {"rangemode": "tozero", "ticksuffix": "%"}, _percent(run.column("mfu"))
    return noisy("mfu", "Model FLOPs utilisation", values, "% of the peak", axis, "speed")


def _others(run: Run) -> list[Figure]:
    """A plot for every further group of numbers: ``a/b/...`` in one plot, names without a slash alone."""
    keys = {key for line in run.steps for key, value in line.items() if isinstance(value, int | float)}
    groups: dict[str, list[str]] = {}
    for key in sorted(keys - _SHOWN):
        claimed = key.startswith(("domain_loss/", "weights/share/", "weights/uniform_share/")) or SHOWN.fullmatch(key)
        if not claimed:
            groups.setdefault(key.rpartition("/")[0] or key, []).append(key)
    figures = []
    for number, (group, members) in enumerate(groups.items()):
        traces = [curve(key, *run.column(key), colour(place)) for place, key in enumerate(members)]
        figures.append(Figure(f"other_{number}", group, traces, {"yaxis": {}}, section="others"))
    return figures


def _percent(values: Column) -> Column:
    return values[0], [100 * value for value in values[1]]
