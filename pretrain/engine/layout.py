"""Where every element of the weights and of the optimizer's state lies in the files of a checkpoint, by name.

``layout.json`` of a checkpoint says it, so that whoever reads needs to know nothing of ZeRO stages and ranks::

    {"format": 1,
     "model": FILE,                                 the module's buffers, and the counters of DeepSpeed's engine
     "parameters": {NAME: SHAPE},
     "tensors": [{"file": FILE, "elements": N,      one for each tensor that an optimizer steps
                  "weights": KEYS, "state": KEYS,   what leads from the file's content to the fp32 weights, and to the
                                                    mapping of optimizer state; each state of N elements lies alike
                  "parts": [[NUMBER, START, LENGTH, OFFSET], ...],
                  "matrices": [NAME, ...]}]}        kept whole in the state, under "matrices"; of a stack, NAME[3]

A part are LENGTH consecutive elements of parameter NUMBER (in the order of "parameters"), row by row from START, which
lie at OFFSET. The parameters' parts need not be on all ranks, nor on each in equal shares; they may be on several.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.files import publish_bytes

TAG = "deepspeed"
"""Name of DeepSpeed's folder inside a checkpoint."""
NAME = "layout.json"
FORMAT = 1

Key = str | int


@dataclass(frozen=True)
class Part:
    """Consecutive elements of a parameter, row by row, and where a flat tensor holds them."""

    name: str
    start: int
    """First element in the parameter."""
    length: int
    offset: int
    """First element in the tensor."""


@dataclass(frozen=True)
class Place:
    """One tensor that an optimizer steps, with its state, in a file of a checkpoint."""

    file: str
    """Relative to the checkpoint's folder."""
    weights: tuple[Key, ...]
    state: tuple[Key, ...]
    elements: int
    """Of the tensor; those in no part are filling, and may be left out at its end."""
    parts: tuple[Part, ...]
    matrices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """All places of a checkpoint."""

    model: str
    shapes: dict[str, tuple[int, ...]]
    places: tuple[Place, ...]

    def problems(self) -> list[str]:
        """What makes it no map of whole parameters, one sentence each: gaps, and parts that lie nowhere."""
        found = []
        by_name: dict[str, list[Part]] = {name: [] for name in self.shapes}
        for place in self.places:
            for part in place.parts:
                if part.name not in by_name:
                    found.append(f"{place.file} holds elements of {part.name!r}, which is no parameter")
                elif part.start < 0 or part.length < 1 or not 0 <= part.offset <= place.elements - part.length:
                    found.append(f"{place.file} holds elements of {part.name} beyond its {place.elements}")
                else:
                    by_name[part.name].append(part)
        for name, parts in by_name.items():
            end, elements = 0, math.prod(self.shapes[name])
            for part in sorted(parts, key=lambda part: part.start):
                if part.start > end:
                    break
                end = max(end, part.start + part.length)
            if end != elements:
                found.append(f"elements {end} and following of the {elements} of {name} lie in no file")
        return found


def resolve(content: Any, keys: tuple[Key, ...]) -> Any:
    """What ``keys`` lead to; a last key that is missing leads to an empty mapping: no state yet."""
    for key in keys[:-1]:
        content = content[key]
    if isinstance(content, Mapping) and keys[-1] not in content:
        return {}
    return content[keys[-1]]


def write_layout(folder: Path, layout: Layout) -> Path:
    """Publish the record of a checkpoint; returns its path."""
    shapes = dict(sorted(layout.shapes.items()))
    numbers = {name: number for number, name in enumerate(shapes)}
    tensors = [
        {
            "file": place.file,
            "elements": place.elements,
            "weights": list(place.weights),
            "state": list(place.state),
            "parts": [[numbers[part.name], part.start, part.length, part.offset] for part in place.parts],
            "matrices": list(place.matrices),
        }
        for place in layout.places
    ]
    record = {"format": FORMAT, "model": layout.model, "parameters": shapes, "tensors": tensors}
    # compact: at stage 3 there are as many parts as parameters times ranks
    publish_bytes(folder / NAME, json.dumps(record, separators=(",", ":")).encode() + b"\n")
    return folder / NAME


def read_layout(folder: Path) -> Layout:
    """The record of a checkpoint, whole.

    Raises:
        DataError: it is missing, can't be read, or does not say where all elements of all parameters lie.
    """
    path = folder / NAME
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r} instead of {FORMAT}")
        names = list(content["parameters"])
        places = tuple(
            Place(
                each["file"],
                tuple(each["weights"]),
                tuple(each["state"]),
                each["elements"],
                tuple(Part(names[number], *where) for number, *where in each["parts"]),
                tuple(each["matrices"]),
            )
            for each in content["tensors"]
        )
        layout = Layout(content["model"], {name: tuple(shape) for name, shape in content["parameters"].items()}, places)
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise DataError(f"{path} can't be read: {error!r}. Use another checkpoint, or a copy of this one.") from error
    if found := layout.problems():
        raise DataError(f"{path} is no map of its checkpoint: {'; '.join(found[:4])}. Use another checkpoint.")
    return layout
