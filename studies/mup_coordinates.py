"""The coordinate check of muP: does what flows through the model keep its size when the model gets wider?

    python -m studies.mup_coordinates [--short]

Models of widths 2^k take a few steps on one fixed batch. Before each of them the mean |x| of every pre-activation, of
the attention scores and of the logits is recorded, and the mean |Δx| against what it was at the start. The slopes of
their logarithms against that of the width say how they grow: with muP 0, in the standard parametrisation up to 1 and
beyond (Yang et al. 2022, arXiv 2203.03466, appendix D.1 and figure 5). Logits and scores of the first step may shrink
as 1 / sqrt(width), unless head and query start at zero. The number of heads stays, so that the heads widen too.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from data_pipeline.settings import build_settings
from pretrain.model import Decoder, ModelSettings, initialize_
from pretrain.model.mup import width_scaling
from pretrain.optimizer import AdamWSettings, OptimizerSettings, parameter_groups

from .common import Curve, Plot, interval, put_section, shown, table, write_plots
from .common.runs import ROOT

VOCABULARY, ROWS, LENGTH, HEADS = 16, 2, 8, 4
"""Few tokens: the correlated part of an update, which muP keeps at its size, soon outweighs the random rest."""

Recorded = dict[str, Tensor]
Coordinates = dict[tuple[str, int], np.ndarray[Any, np.dtype[np.float64]]]
"""For a quantity and a number of steps: [widths, seeds, 2], mean |x| and mean |Δx|."""


def model_settings(width: int, mup: Mapping[str, Any] | None, **changes: Any) -> ModelSettings:
    """A decoder of two blocks; ``mup`` is the section ``model.mup`` without its base, None the standard one."""
    return build_settings(
        ModelSettings,
        {**shape(width), "layers": 2, "kv_heads": HEADS // 2, "init_std": 0.05, **changes, "mup": mup},
        "coordinates",
    )


def shape(width: int) -> dict[str, int]:
    return {"hidden_size": width, "heads": HEADS, "intermediate_size": 2 * width}


class _Scores(TorchFunctionMode):
    """Records the attention scores, which exist only inside torch's kernel."""

    def __init__(self, into: Recorded) -> None:
        super().__init__()
        self._into = into
        self._blocks = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key = args[0], args[1]
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            scale = (kwargs or {})["scale"] or 1.0 / math.sqrt(query.shape[-1])
            self._into[f"blocks.{self._blocks}.attention scores"] = (query @ key.transpose(-1, -2) * scale).detach()
            self._blocks += 1
        return func(*args, **(kwargs or {}))


def record(model: Decoder, tokens: Tensor) -> tuple[Tensor, Recorded]:
    """The logits, and every linear layer's and the embedding's output by name, with the scores of every block."""
    seen: Recorded = {}

    def keep(name: str, module: nn.Module, given: Any, output: Tensor) -> None:
        seen[name] = output.detach()

    hooks = [
        module.register_forward_hook(partial(keep, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    ]
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    with _Scores(seen):
        logits: Tensor = model(tokens, places, torch.zeros_like(tokens), True)
    for hook in hooks:
        hook.remove()
    return logits, seen


def train(settings: ModelSettings, optimizer: OptimizerSettings, seed: int, steps: int) -> list[Recorded]:
    """What is recorded before each of ``steps`` steps and after the last, on one batch of random tokens."""
    model = Decoder(settings, VOCABULARY)
    initialize_(model, seed)
    scaling = partial(width_scaling, settings=settings, rate=optimizer.mup_rate)
    update = optimizer.build(parameter_groups(model.named_parameters(), optimizer, scaling))
    rows = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    recorded = []
    for _ in range(steps + 1):
        logits, seen = record(model, rows[:, :-1])
        recorded.append(seen)
        update.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
        for group in update.param_groups:
            group["lr"] = optimizer.lr * group["lr_scale"]
        update.step()
    return recorded


def coordinates(
    widths: Sequence[int],
    mup: Mapping[str, Any] | None,
    optimizer: OptimizerSettings,
    seeds: int,
    steps: int,
    **changes: Any,
) -> Coordinates:
    """Train every width with every seed; the narrowest is muP's base shape. ``changes`` are of the model."""
    section = None if mup is None else {"base": shape(widths[0]), **mup}
    found: Coordinates = {}
    for i, width in enumerate(widths):
        for seed in range(seeds):
            recorded = train(model_settings(width, section, **changes), optimizer, seed, steps)
            for step, seen in enumerate(recorded):
                for name, x in seen.items():
                    of_all = found.setdefault((name, step), np.zeros((len(widths), seeds, 2)))
                    of_all[i, seed] = float(x.abs().mean()), float((x - recorded[0][name]).abs().mean())
    return found


def slopes(widths: Sequence[int], sizes: np.ndarray[Any, np.dtype[np.float64]]) -> list[float]:
    """For each seed, d log(size) / d log(width) by least squares; ``sizes`` [widths, seeds]. NaN where one is 0."""
    logs = np.log2(sizes, out=np.full_like(sizes, np.nan), where=sizes > 0)
    if np.isnan(logs).any():
        return [math.nan] * sizes.shape[1]
    return [float(slope) for slope in np.polyfit(np.log2(widths), logs, 1)[0]]


VARIANTS: dict[str, Mapping[str, Any] | None] = {
    "standard": None,
    "muP": {},
    "muP, zero head and query": {"zero_init_head": True, "zero_init_query": True},
}


def report(widths: Sequence[int], found: Mapping[str, Coordinates], steps: int) -> tuple[str, list[Plot]]:
    """The section of docs/studies.md, and a plot for each quantity and variant after the last step."""
    names = sorted({name for name, _ in next(iter(found.values()))})
    seeds = next(iter(next(iter(found.values())).values())).shape[1]
    rows = []
    for name in names:
        cells = []
        for of_variant in found.values():
            first = interval(slopes(widths, of_variant[name, 0][:, :, 0]))
            change = interval(slopes(widths, of_variant[name, steps][:, :, 1]))
            cells += ["0" if math.isnan(first.mean) else shown(first, 2), shown(change, 2)]
        rows.append([name, *cells])
    header = ["", *(f"{variant}: {what}" for variant in found for what in ("x at the start", "Δx"))]
    text = f"""## Coordinate check of muP

How the mean size of every pre-activation depends on the width: the slope of its logarithm against that of the width,
{widths[0]} to {widths[-1]}, before training and of what {steps} steps changed, {seeds} seeds. 0: the same at every
width. A `0` in the first column of a variant says that the quantity starts at zero.

{table(header, rows)}
"""
    plots = [
        Plot(
            f"{variant}: mean |x| before step t",
            "width",
            "mean |x|",
            [
                Curve(f"{name}, t = {step}", list(widths), of_variant[name, step][:, :, 0].mean(axis=1).tolist())
                for name in names
                for step in (0, 1, steps)
            ],
            log_x=True,
            log_y=True,
        )
        for variant, of_variant in found.items()
    ]
    return text, plots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="seconds; docs/studies.md stays as it is")
    short = parser.parse_args().short
    widths = tuple(2**k for k in (range(5, 8) if short else range(7, 12)))
    seeds, steps = (2, 3) if short else (5, 4)
    optimizer = AdamWSettings(lr=0.004, weight_decay=0.0)
    found = {name: coordinates(widths, mup, optimizer, seeds, steps) for name, mup in VARIANTS.items()}
    text, plots = report(widths, found, steps)
    print(text)
    page = ROOT / "runs/studies/mup_coordinates.html"
    write_plots(page, plots)
    print(f"plots: {page}")
    if not short:
        put_section("mup_coordinates", text, "python -m studies.mup_coordinates")


if __name__ == "__main__":
    main()
