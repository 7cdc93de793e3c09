"""What benchmarks/parameterizations.py measured, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Result = dict[str, Any]

GALORE_GAP = 200
"""Steps from one of GaLore's decompositions to the next, its default."""
WHOLE_BATCH = 131_072
"""Tokens of a step in the papers: 512 sequences of 256."""
CLAIMS = (
    ("all", "parameters at 60M, 130M, 1B", "published for SLTrain: 44, 97, 646 million; for the others see the tables"),
    ("LOST", "perplexity and memory at 1B", "15.02 against 15.56 of full rank, with about half the memory (secondary)"),
    ("LOST", "memory and time at 60M and 130M", "unconfirmed: its table could not be obtained"),
    ("CoLA, SLTrain, GaLore", "memory and time", "no figure in our sources that is confirmed"),
)


def render(result: Result) -> str:
    """All of it: a table for each size, the papers' claims, the plan's numbers."""
    machine = f"{result['machine']}, torch {result['torch']}, commit {result['commit'][:12]}"
    rows = next(iter(result["measured"].values()))["rows"]
    command = f"python benchmarks/parameterizations.py --rows {rows} --turns {result['turns']}"
    lines = [
        "# Parameterizations of the linear layers",
        "",
        f"`{command}` on {machine}; medians of {result['turns']} turns.",
        "",
        "Peak memory is the resident set's high-water mark above what the process had before the model was made: "
        "weights, gradients, optimizer state, activations and the allocator's gaps. Kept is what lives from the "
        "forward to the backward pass besides weights and logits. The step is in CPU seconds over those of the dense "
        "model without recompute in the same turns, with its two parts beside it; GaLore's update has "
        f"1 / {GALORE_GAP} of its decompositions. The "
        f"last column is computed from the parts for the papers' {WHOLE_BATCH:,} tokens a step.",
    ]
    for size, measured in result["measured"].items():
        lines += ["", *_measured(size, measured)]
    lines += ["", "## What the papers claim", "", *_table(("method", "what", "claim"), CLAIMS)]
    for size, planned in result["planned"].items():
        lines += ["", *_planned(size, planned)]
    return "\n".join(lines) + "\n"


def _measured(size: str, measured: Result) -> Iterator[str]:
    tokens = measured["rows"] * measured["length"]
    blocks = f", only {measured['layers']} blocks" if measured["layers"] else ""
    yield f"## {size.upper()}, {measured['rows']} sequences of {measured['length']} tokens{blocks}, measured"
    yield ""
    base = measured["found"]["dense"]["none"]["memory"]
    rows = []
    for (kind, how), found in _cases(measured["found"]):
        memory, (passes, update) = found["memory"], _parts(found["time"])
        dense = found["dense"]["passes"], found["dense"]["update"]
        scale = WHOLE_BATCH / tokens
        rows.append(
            (
                kind,
                how,
                f"{memory['parameters'] / 1e6:.2f}",
                _mib(memory["optimizer_bytes"]),
                _mib(memory["buffer_bytes"]),
                f"{_mib(memory['peak_bytes'])} ({memory['peak_bytes'] / base['peak_bytes']:.2f})",
                f"{_mib(memory['kept_bytes'])} ({memory['kept_bytes'] / base['kept_bytes']:.2f})",
                f"{(passes + update) / sum(dense):.2f}",
                f"{passes / dense[0]:.2f}",
                f"{update / dense[1]:.2f}",
                f"{(scale * passes + update) / (scale * dense[0] + dense[1]):.2f}",
            )
        )
    heads = (
        "model",
        "recompute",
        "M parameters",
        "MiB optimizer",
        "MiB buffers",
        "MiB peak (ratio)",
        "MiB kept (ratio)",
    )
    yield from _table((*heads, "step", "forward and backward", "update", f"step of {WHOLE_BATCH:,} tokens"), rows)
    yield ""
    dense = measured["found"]["dense"]["none"]["dense"]
    yield f"The dense step took {sum(dense.values()):.2f} CPU seconds, {dense['update']:.2f} s of it the update."


def _parts(taken: dict[str, float]) -> tuple[float, float]:
    """Seconds of forward and backward pass, and of the update with its share of what only some updates do."""
    return taken["passes"], taken["update"] + max(0.0, taken["first_update"] - taken["update"]) / GALORE_GAP


def _planned(size: str, planned: Result) -> Iterator[str]:
    yield f"## {size.upper()}, planned: the shipped configuration on one rank, bf16, by `pretrain plan`'s arithmetic"
    yield ""
    base = planned["dense"]
    rows = []
    for kind, plan in planned.items():
        activations = plan["activations"]
        rows.append(
            (
                kind,
                f"{plan['parameters'] / 1e6:.2f}",
                f"{plan['flops_per_token'] / base['flops_per_token']:.2f}",
                f"{plan['optimizer_state'] / 2**30:.2f} ({plan['optimizer_state'] / base['optimizer_state']:.2f})",
                f"{plan['buffers'] / 2**20:.1f}",
                *(f"{activations[how]['token'] / 1024:.0f}" if how in activations else "" for how in _WAYS),
            )
        )
    heads = ("model", "M parameters", "FLOPs of weights, ratio", "GiB optimizer (ratio)", "MiB buffers")
    yield from _table((*heads, *(f"KiB of activations a token, {how}" for how in _WAYS)), rows)


_WAYS = ("none", "full", "low_rank")


def _cases(found: dict[str, dict[str, Any]]) -> Iterator[tuple[tuple[str, str], Any]]:
    return (((kind, how), each) for kind, ways in found.items() for how, each in ways.items())


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"| {' | '.join('---' for _ in heads)} |"
    for row in rows:
        yield f"| {' | '.join(row)} |"
