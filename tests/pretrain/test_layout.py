"""Loading by name and slice, on files that are laid out here by hand: every element once, nothing else read."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.errors import DataError, HeadraceError
from pretrain.engine.by_name import load_by_name, plan_copies
from pretrain.engine.layout import NAME, Layout, Part, Place, read_layout, write_layout
from pretrain.engine.shards import Shard
from pretrain.optimizer.matrix_wise import MATRICES

SHAPES: dict[str, tuple[int, ...]] = {"embedding": (7, 5), "gain": (11,), "matrix": (6, 9), "one": (1,)}


def cut(shapes: dict[str, tuple[int, ...]], share: int, order: list[str]) -> list[tuple[Part, ...]]:
    """The parameters one after another, in ``order``, cut into tensors of ``share`` elements, as ZeRO 1 does."""
    tensors: list[tuple[Part, ...]] = []
    offset = 0
    for name in order:
        start, left = 0, math.prod(shapes[name])
        while left:
            if offset == len(tensors) * share:
                tensors.append(())
            length = min(left, len(tensors) * share - offset)
            tensors[-1] += (Part(name, start, length, offset - (len(tensors) - 1) * share),)
            start, left, offset = start + length, left - length, offset + length
    return tensors


class Saved:
    """A checkpoint of numbered elements: element i of parameter k is 1000 k + i, its moments that times 2 and 3."""

    def __init__(self, folder: Path, shapes: dict[str, tuple[int, ...]], tensors: list[tuple[Part, ...]]) -> None:
        self.folder = folder
        self.values = {
            name: 1000.0 * number + torch.arange(math.prod(shape), dtype=torch.float32)
            for number, (name, shape) in enumerate(shapes.items())
        }
        self.steps = [5.0] * len(tensors)
        places = []
        for number, parts in enumerate(tensors):
            elements = parts[-1].offset + parts[-1].length + 3  # and some filling
            places.append(Place(f"{number}.pt", ("flat", 0), ("inner", "state", 0), elements, parts))
        self.layout = Layout("0.pt", shapes, tuple(places))

    def write(self, change: Callable[[int, dict[str, Any]], None] = lambda number, state: None) -> None:
        for number, place in enumerate(self.layout.places):
            flat = torch.full((place.elements,), torch.nan)
            for part in place.parts:
                flat[part.offset : part.offset + part.length] = self.values[part.name][part.start :][: part.length]
            state = {"step": torch.tensor(self.steps[number]), "mean": 2 * flat, "square": 3 * flat}
            change(number, state)
            torch.save({"flat": [flat], "inner": {"state": {0: state} if state else {}}}, self.folder / place.file)

    def load(self, tensors: list[tuple[Part, ...]]) -> tuple[list[Tensor], torch.optim.Optimizer, int]:
        """Into one rank's ``tensors``."""
        held = [torch.zeros(parts[-1].offset + parts[-1].length) for parts in tensors]
        optimizer = torch.optim.AdamW(held)
        shards = [Shard(flat, 0, (), parts) for flat, parts in zip(held, tensors, strict=True)]
        copied = load_by_name(self.folder, self.layout, shards, optimizer, {})
        return held, optimizer, copied


def test_every_element_comes_from_its_place(tmp_path: Path) -> None:
    """Random cuts and orders of parameters, there and here; a rank here reads its own elements and nothing else."""
    random = np.random.default_rng(0)
    for case in range(30):
        folder = tmp_path / str(case)
        folder.mkdir()
        there, here = ([str(name) for name in random.permutation(list(SHAPES))] for _ in range(2))
        saved = Saved(folder, SHAPES, cut(SHAPES, int(random.integers(1, 120)), there))
        saved.write()
        for tensors in ([each] for each in cut(SHAPES, int(random.integers(1, 120)), here)):
            (held,), optimizer, copied = saved.load(tensors)
            state = optimizer.state[held]
            for part in tensors[0]:
                expected = saved.values[part.name][part.start :][: part.length]
                for flat, factor in ((held, 1), (state["mean"], 2), (state["square"], 3)):
                    assert torch.equal(flat[part.offset : part.offset + part.length], factor * expected)
            assert float(state["step"]) == 5.0
            assert copied == 3 * 4 * sum(part.length for part in tensors[0])


def test_tensors_count_their_steps_apart(tmp_path: Path) -> None:
    """DeepSpeed's own load gives all of them one tensor, which torch then advances once for each."""
    saved = Saved(tmp_path, SHAPES, cut(SHAPES, 200, list(SHAPES)))
    saved.write()
    held, optimizer, _ = saved.load(cut(SHAPES, 10, list(SHAPES)))
    steps = [optimizer.state[flat]["step"] for flat in held]
    assert len({step.data_ptr() for step in steps}) == len(steps) > 5


def test_state_that_was_loaded_is_saved_in_the_bytes_of_one_that_was_made(tmp_path: Path) -> None:
    """From several files, and with matrices in another order than this rank's: it is the order of the optimizer."""
    tensors = cut(SHAPES, 40, list(SHAPES))
    saved = Saved(tmp_path, SHAPES, tensors)
    names = ["b[0]", "a[1]", "a[0]"]

    def keep(number: int, state: dict[str, Any]) -> None:
        if number < len(names):
            state[MATRICES] = {names[number]: {"step": number, "basis": torch.ones(number + 1)}}

    saved.write(keep)
    places = [
        replace(place, matrices=tuple(names[number : number + 1])) for number, place in enumerate(saved.layout.places)
    ]
    held = [torch.zeros(parts[-1].offset + parts[-1].length) for parts in tensors]
    optimizer = torch.optim.AdamW(held)
    shards = [Shard(flat, 0, (), parts) for flat, parts in zip(held, tensors, strict=True)]
    homes = dict.fromkeys(sorted(names), held[1])
    load_by_name(tmp_path, replace(saved.layout, places=tuple(places)), shards, optimizer, homes)
    kept = optimizer.state[held[1]][MATRICES]
    assert [(name, state["step"]) for name, state in kept.items()] == [("a[0]", 2), ("a[1]", 1), ("b[0]", 0)]
    keys = [key for state in optimizer.state.values() for key in state]
    assert len(set(map(id, keys))) == len(set(keys)) == 4


def test_copies_on_several_ranks_are_read_once(tmp_path: Path) -> None:
    tensors = cut(SHAPES, 40, list(SHAPES))
    saved = Saved(tmp_path, SHAPES, [*tensors, *tensors[::-1]])
    assert saved.layout.problems() == []
    saved.write()
    (held,), _, copied = saved.load(cut(SHAPES, 1000, list(SHAPES)))
    assert copied == 3 * 4 * len(held)
    assert torch.equal(held, torch.cat(list(saved.values.values())))


def test_counts_that_disagree_are_refused_where_they_would_be_one(tmp_path: Path) -> None:
    saved = Saved(tmp_path, SHAPES, cut(SHAPES, 40, list(SHAPES)))
    saved.steps[1] = 6.0
    saved.write()
    saved.load(cut(SHAPES, 40, list(SHAPES)))
    with pytest.raises(HeadraceError, match=r"state 'step' of .* saved as 5.0 for some elements and as 6.0 for others"):
        saved.load(cut(SHAPES, 1000, list(SHAPES)))


def without_mean(number: int, state: dict[str, Any]) -> None:
    if number == 1:
        del state["mean"]


def test_state_of_some_elements_is_no_state(tmp_path: Path) -> None:
    saved = Saved(tmp_path, SHAPES, cut(SHAPES, 40, list(SHAPES)))
    saved.write(without_mean)
    with pytest.raises(HeadraceError, match=r"state 'mean' of .* was saved for 61 of 101 elements"):
        saved.load(cut(SHAPES, 1000, list(SHAPES)))
    saved.write(lambda number, state: state.clear())
    (held,), optimizer, _ = saved.load(cut(SHAPES, 1000, list(SHAPES)))
    assert optimizer.state[held] == {}


def test_another_precision_is_no_copy(tmp_path: Path) -> None:
    saved = Saved(tmp_path, SHAPES, cut(SHAPES, 40, list(SHAPES)))
    saved.values = {name: value.bfloat16() for name, value in saved.values.items()}
    saved.write()
    for path in tmp_path.glob("*.pt"):
        content = torch.load(path)
        torch.save({**content, "flat": [content["flat"][0].bfloat16()]}, path)
    with pytest.raises(HeadraceError, match=r"holds torch\.bfloat16 where this run has torch\.float32"):
        saved.load(cut(SHAPES, 40, list(SHAPES)))


def test_the_record_comes_back(tmp_path: Path) -> None:
    layout = Saved(tmp_path, dict(sorted(SHAPES.items())), cut(SHAPES, 40, list(SHAPES))).layout
    layout = replace(layout, places=(replace(layout.places[0], matrices=("matrix",)), *layout.places[1:]))
    write_layout(tmp_path, layout)
    assert read_layout(tmp_path) == layout


def without_a_part(content: dict[str, Any]) -> None:
    content["tensors"][1]["parts"].pop()


def beyond(content: dict[str, Any]) -> None:
    content["tensors"][1]["parts"][0][3] += 100


def other_format(content: dict[str, Any]) -> None:
    content["format"] = 2


def unknown(content: dict[str, Any]) -> None:
    content["tensors"][1]["parts"][0][0] = 17


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (without_a_part, r"elements \d+ and following of the \d+ of \w+ lie in no file"),
        (beyond, r"1\.pt holds elements of \w+ beyond its 43"),
        (other_format, "format 2 instead of 1"),
        (unknown, "can't be read: IndexError"),
    ],
)
def test_a_record_that_is_no_map_is_told(tmp_path: Path, harm: Callable[[dict[str, Any]], None], told: str) -> None:
    write_layout(tmp_path, Saved(tmp_path, SHAPES, cut(SHAPES, 40, list(SHAPES))).layout)
    content = json.loads((tmp_path / NAME).read_text())
    harm(content)
    (tmp_path / NAME).write_text(json.dumps(content))
    with pytest.raises(DataError, match=told):
        read_layout(tmp_path)


def test_no_record_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"layout\.json can't be read: FileNotFoundError"):
        read_layout(tmp_path)


def test_what_is_in_no_file_is_not_made_up(tmp_path: Path) -> None:
    layout = Saved(tmp_path, SHAPES, cut(SHAPES, 40, list(SHAPES))[:-1]).layout
    tensors = cut(SHAPES, 1000, list(SHAPES))
    with pytest.raises(HeadraceError, match="elements 34 to 54 of matrix are not in the checkpoint"):
        plan_copies(layout, [Shard(torch.zeros(1000), 0, (), tensors[0])])
    first, _, *others = cut(SHAPES, 20, sorted(SHAPES, reverse=True))
    layout = Saved(tmp_path, SHAPES, [first, *others]).layout
    with pytest.raises(HeadraceError, match="elements 19 to 54 of matrix are not in the checkpoint"):
        plan_copies(layout, [Shard(torch.zeros(54), 0, (), (Part("matrix", 0, 54, 0),))])


def anonymous_bytes() -> int:
    """This process's memory that is no file's: what mapped files take is the page cache's and can be given up."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_memory_is_bounded_by_the_share_of_a_rank(tmp_path: Path) -> None:
    """96 MB of weights and moments on 2 ranks, loaded as one of 8: 12 MB, never 48 for a file of the old ones."""
    shapes = {f"matrix{number}": (1024, 1024) for number in range(8)}
    saved = Saved(tmp_path, shapes, cut(shapes, 4 << 20, list(shapes)))
    saved.write()
    share = cut(shapes, 1 << 20, list(shapes))[3:4]
    saved.values, peak, done = {}, 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, anonymous_bytes())

    before, watcher = anonymous_bytes(), threading.Thread(target=watch)
    watcher.start()
    _, _, copied = saved.load(share)
    done.set()
    watcher.join()
    assert copied == 3 * 4 << 20
    assert max(peak, anonymous_bytes()) - before < 20e6
