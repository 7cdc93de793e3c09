"""How a model's experts were used over the run: load, balance, and which source's tokens went to which expert.

A map of loads shows multiples of an even share: 1 is balanced, 0 is an expert without a token.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from typing import Any

from .plot import Figure, colour, curve, noisy, y_axis
from .run import Run
from .series import COLUMNS, mean_columns

BLOCKS = 8
"""Blocks that get maps of their own; of more, those whose busiest expert has the most at the end."""
CELLS = 400_000
"""Of the maps of all blocks over the steps together: of a wide model they have fewer columns."""
HOTTEST = 4
"""Multiple of an even share from which on the colour is the same."""
SHOWN = re.compile(
    r"experts/(?:imbalance|load_cv|dead|entropy|dropped|specialization|bias_range|loss/[^/]+"
    r"|(?:imbalance|entropy|specialization)/\d+)"
)
"""The numbers of a step line that this section's plots show."""

_PREFIX = "experts/load/"
_OF_BLOCKS = (
    ("imbalance", "Imbalance by block", "busiest / mean", "Load of a block's busiest expert over the mean."),
    ("entropy", "Routing entropy by block", "nats", "Of the routers' distributions, nats a token."),
    ("specialization", "Specialization by block", "specialization", "I(source; expert) / H(source), from 0 to 1."),
)


def expert_figures(run: Run) -> list[Figure]:
    """Every plot of the two sections for which the run has data, in reading order."""
    blocks = _blocks(run)
    over_steps = [_of_blocks(run, blocks, *each) for each in _OF_BLOCKS]
    figures = [*_curves(run), *(over_steps if len(blocks) > 1 else [])]
    if blocks:
        shown = _worst(run, blocks)
        figures += [_loads_at_the_end(run, blocks)] if len(shown) < len(blocks) else []
        columns = max(8, min(COLUMNS, CELLS // (len(shown) * len(_end(run, _PREFIX + str(shown[0]))))))
        for block in shown:
            figures += [_loads(run, block, columns), _domains(run, block)]
    return [figure for figure in figures if figure is not None]


def _blocks(run: Run) -> list[int]:
    """The numbers of the blocks whose loads are known, from 0."""
    numbers = sorted(int(name) for name in run.names(_PREFIX) if name.isdecimal())
    return [number for number in numbers if _end(run, _PREFIX + str(number))]


def _lines(run: Run, key: str) -> tuple[list[int], list[list[float]]]:
    """Steps [n] and lists [n][E] of the step lines whose ``key`` is a list as long as the newest one's."""
    found = [(line["step"], line[key]) for line in run.steps if isinstance(line.get(key), list) and line[key]]
    found = [each for each in found if len(each[1]) == len(found[-1][1])]
    return [step for step, _ in found], [values for _, values in found]


def _end(run: Run, key: str) -> list[float]:
    """The mean list [E] of the last tenth of the lines that have one; empty where none has."""
    _, lists = _lines(run, key)
    last = lists[-max(1, len(lists) // 10) :]
    return [sum(values) / len(last) for values in zip(*last, strict=True)]


def _worst(run: Run, blocks: Sequence[int]) -> list[int]:
    """At most ``BLOCKS`` of the blocks, in their order."""
    ends = {block: _end(run, _PREFIX + str(block)) for block in blocks}
    busiest = sorted(blocks, key=lambda block: -max(ends[block]) * len(ends[block]))
    return sorted(busiest[:BLOCKS])


def _curves(run: Run) -> list[Figure | None]:
    """What the blocks have in common."""
    most = max((len(_end(run, _PREFIX + str(block))) for block in _blocks(run)), default=0)
    entropy = "Of the routers' distributions, the mean over the blocks."
    entropy += f" Undecided between {most:,} experts it is {math.log(most):.3f}." if most else ""
    zero: dict[str, Any] = {"rangemode": "tozero"}
    dropped = [100 * value for value in run.column("experts/dropped")[1]]
    singles: list[tuple[str, str, str, dict[str, Any], str]] = [
        ("imbalance", "Imbalance", "busiest / mean", {}, "Load of the busiest expert over the mean, 1 is balanced."),
        ("load_cv", "Coefficient of variation", "deviation / mean", zero, "Of the loads of a block's experts."),
        ("dead", "Dead experts", "experts", zero, "Without a token in the step, of all blocks together."),
        ("entropy", "Routing entropy", "nats", zero, entropy),
        ("specialization", "Specialization", "I(source; expert) / H(source)", zero,
         "0: all sources use the experts alike; 1: no expert sees tokens of two."),
        ("bias_range", "Selection bias", "largest less smallest", zero, "The largest difference in a block."),
    ]  # fmt: skip
    figures = [
        noisy(f"experts_{key}", title, run.column(f"experts/{key}"), unit, axis, "experts", note)
        for key, title, unit, axis, note in singles
    ]
    if any(dropped):
        values = (run.column("experts/dropped")[0], dropped)
        axis = {**zero, "ticksuffix": "%"}
        figures.append(noisy("experts_dropped", "Dropped", values, "% of the slots", axis, "experts"))
    return [*figures, *_losses(run)]


def _losses(run: Run) -> list[Figure]:
    """The balancing losses, which are 1 when balanced, in one plot; any other loss on routers in its own."""
    labels = run.names("experts/loss/")
    balancing = [label for label in labels if label not in ("router_z", "entropy")]
    groups = [("Balancing losses", balancing)] + [
        (f"Router loss {each}", [each]) for each in labels if each not in balancing
    ]
    figures = []
    for number, (title, members) in enumerate(groups):
        traces = [
            curve(label, *run.column(f"experts/loss/{label}"), colour(place)) for place, label in enumerate(members)
        ]
        note = "1 is balanced. " if members == balancing else ""
        note += "Without coefficient, the mean over the blocks."
        if traces:
            figures.append(Figure(f"experts_loss_{number}", title, traces, y_axis(""), note, section="experts"))
    return figures


def _of_blocks(run: Run, blocks: Sequence[int], key: str, title: str, unit: str, note: str) -> Figure | None:
    """Heat map [block, column of steps] of one number."""
    keys = [f"experts/{key}/{block}" for block in blocks]
    lines = [line for line in run.steps if all(isinstance(line.get(each), int | float) for each in keys)]
    if not lines:
        return None
    edges, means = mean_columns([line["step"] for line in lines], [[line[each] for each in keys] for line in lines])
    heat = {
        **_heat(edges, list(range(len(blocks))), _rows(means)),
        "customdata": [[block] * len(means) for block in blocks],
        "colorscale": [[0, "@heat-low"], [0.5, "@heat-middle"], [1, "@heat-high"]],
        "colorbar": _bar(unit),
        "hovertemplate": "step %{x:,.0f}<br>block %{customdata}<br>%{z:.4~g}<extra></extra>",
    }
    places = _ticks(len(blocks))
    axis = {
        "title": {"text": "block"},
        "tickvals": places,
        "ticktext": [str(blocks[place]) for place in places],
        "showgrid": False,
    }
    return _map(f"experts_{key}_by_block", title, heat, {"yaxis": axis}, note, section="experts")


def _loads(run: Run, block: int, columns: int) -> Figure:
    """Heat map [expert, column of steps] of a block's loads."""
    edges, means = mean_columns(*_lines(run, _PREFIX + str(block)), columns)
    experts = len(means[0])
    heat = {
        **_multiples(_heat(edges, list(range(experts)), _rows(means)), experts),
        "hovertemplate": "step %{x:,.0f}<br>expert %{y}<br>%{z:.4~g} of an even share<extra></extra>",
    }
    axis = {"title": {"text": "expert"}, "tickvals": _ticks(experts), "showgrid": False}
    return _map(f"experts_load_{block}", f"Load of the experts, block {block}", heat, {"yaxis": axis}, "1 is balanced.")


def _loads_at_the_end(run: Run, blocks: Sequence[int]) -> Figure:
    """Heat map [block, expert] of all blocks."""
    ends = [_end(run, _PREFIX + str(block)) for block in blocks]
    experts = max(map(len, ends))
    rows = [[*end, *[math.nan] * (experts - len(end))] for end in ends]
    heat = {
        **_multiples(_heat(list(range(experts)), list(range(len(blocks))), rows), experts),
        "customdata": [[block] * experts for block in blocks],
        "hovertemplate": "block %{customdata}<br>expert %{x}<br>%{z:.4~g} of an even share<extra></extra>",
    }
    places = _ticks(len(blocks))
    across = {"title": {"text": "block"}, "tickvals": places, "ticktext": [str(blocks[place]) for place in places]}
    layout = {"xaxis": _expert_axis(experts), "yaxis": {**across, "showgrid": False}}
    note = f"All {len(blocks):,} blocks, the last tenth of the lines. Below: the {BLOCKS} with the busiest experts."
    title = "Load at the end"
    return _map("experts_load_end", title, heat, layout, note, stepwise=False, wide=True)


def _domains(run: Run, block: int) -> Figure | None:
    """Heat map [source, expert]: where the tokens of each source go, and all tokens in the first row."""
    prefix = f"experts/domain_load/{block}/"
    names = run.names(prefix)
    if not names:
        return None
    rows = [_end(run, _PREFIX + str(block)), *(_end(run, prefix + name) for name in names)]
    experts = len(rows[0])
    rows = [row if len(row) == experts else [math.nan] * experts for row in rows]
    heat = {
        **_multiples(_heat(list(range(experts)), ["all", *map(html.escape, names)], rows), experts),
        "hovertemplate": "%{y}<br>expert %{x}<br>%{z:.4~g} of an even share<extra></extra>",
    }
    _, special = run.column(f"experts/specialization/{block}")
    last = special[-max(1, len(special) // 10) :]
    note = f"Specialization {sum(last) / len(last):.3f}. " if last else ""
    layout = {
        "xaxis": _expert_axis(experts),
        "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False},
    }
    note += "The last tenth of the lines."
    return _map(f"experts_domains_{block}", f"Sources by expert, block {block}", heat, layout, note, stepwise=False)


def _map(
    id: str,
    title: str,
    heat: dict[str, Any],
    layout: dict[str, Any],
    note: str,
    *,
    section: str = "blocks",
    stepwise: bool = True,
    wide: bool = False,
) -> Figure:
    layout = {**layout, "hovermode": "closest"}
    return Figure(id, title, [heat], layout, note, wide, section=section, stepwise=stepwise)


def _heat(x: Sequence[float], y: Sequence[Any], rows: Sequence[Sequence[float]]) -> dict[str, Any]:
    """A trace of four significant digits."""
    z = [[float(f"{value:.4g}") if math.isfinite(value) else None for value in row] for row in rows]
    return {"type": "heatmap", "x": list(x), "y": list(y), "z": z, "hoverongaps": False}


def _multiples(heat: dict[str, Any], experts: int) -> dict[str, Any]:
    """Of shares, the multiples of an even one, coloured by which side of 1 they lie on."""
    z = [[None if value is None else round(value * experts, 3) for value in row] for row in heat["z"]]
    ticks = list(range(HOTTEST + 1))
    bar = {**_bar("of an even share"), "tickvals": ticks, "ticktext": [*map(str, ticks[:-1]), f"≥ {HOTTEST}"]}
    scale = [[0, "@heat-cold"], [1 / HOTTEST, "@heat-even"], [1, "@heat-hot"]]
    return {**heat, "z": z, "zmin": 0, "zmax": HOTTEST, "colorscale": scale, "colorbar": bar}


def _bar(unit: str) -> dict[str, Any]:
    return {"title": {"text": unit, "side": "right"}, "thickness": 8, "outlinewidth": 0}


def _rows(columns: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    return list(zip(*columns, strict=True))


def _ticks(count: int, most: int = 8) -> list[int]:
    """Of the places 0, 1, ..., count - 1 every one, or every second, fourth, ...: about ``most`` of them at most."""
    every = 1
    while count > every * most:
        every *= 2
    return list(range(0, count, every))


def _expert_axis(experts: int) -> dict[str, Any]:
    return {"title": {"text": "expert"}, "tickvals": _ticks(experts, 16), "tickformat": ",d"}
