"""Rooms of batches: given again as soon as nobody refers to them in any way, and never before."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from data_pipeline import recycled
from data_pipeline.recycled import Recycled, Room

SHAPE = (3, 9)

WAYS: dict[str, Callable[[Room], Any]] = {
    "rows": lambda room: room.rows,
    "a view of the rows": lambda room: room.rows[1:, 2],
    "a view of the labels": lambda room: room.labels[0],
    "a tensor": lambda room: torch.from_numpy(room.tokens),
    "a view of a tensor that is gone": lambda room: torch.from_numpy(room.labels)[1:, 1:],
    "an array of a tensor that is gone": lambda room: torch.from_numpy(room.tokens).numpy()[1],
    "a tensor under another tensor's storage": lambda room: torch.empty(0, dtype=torch.int64).set_(
        torch.from_numpy(room.rows).untyped_storage()
    ),
    "a graph for the backward pass": lambda room: torch.nn.functional.embedding(
        torch.from_numpy(room.tokens), torch.ones(5, 2, requires_grad=True)
    ),
    "a graph that kept the labels": lambda room: torch.nn.functional.cross_entropy(
        torch.ones(8, 5, requires_grad=True), torch.from_numpy(room.labels)[0]
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_room_is_not_given_again_as_long_as_anything_refers_to_it(way: str) -> None:
    memory = Recycled(SHAPE)
    room = memory.take()
    room.rows[:] = 1
    address, holder = room.address, WAYS[way](room)
    del room
    for _ in range(3):
        assert memory.take().address != address
    del holder
    assert address in {memory.take().address for _ in range(2)}


def test_one_batch_after_the_other_takes_turns_in_two_rooms() -> None:
    memory, seen, batch = Recycled(SHAPE), [], None
    for _ in range(6):
        room = memory.take()
        seen.append(room.address)
        batch = torch.from_numpy(room.tokens)
    del batch
    assert len(set(seen)) == 2
    assert seen[:2] * 3 == seen


def test_a_batch_that_is_kept_for_long_costs_its_own_room_only() -> None:
    memory = Recycled(SHAPE)
    kept = torch.from_numpy(memory.take().tokens)
    addresses = {memory.take().address for _ in range(20)}
    assert len(addresses) == 1
    del kept


def test_rooms_that_nobody_needs_any_more_are_freed() -> None:
    memory = Recycled(SHAPE)
    held = [torch.from_numpy(memory.take().tokens) for _ in range(50)]
    assert len({tensor.data_ptr() for tensor in held}) == 50
    held.clear()
    for _ in range(100):
        memory.take()
    assert len(memory._rooms) == recycled._FREE


def test_threads_never_share_a_room() -> None:
    """One makes, another drops, as a loader and a trainer do; what was written stays until it is dropped."""
    memory = Recycled(SHAPE)
    made: list[tuple[int, torch.Tensor]] = []
    wrong: list[int] = []
    done = threading.Event()

    def drop() -> None:
        while not done.is_set() or made:
            if made:
                number, tensor = made.pop(0)
                if not bool((tensor == number).all()):
                    wrong.append(number)

    thread = threading.Thread(target=drop)
    thread.start()
    for number in range(3000):
        room = memory.take()
        room.rows[:] = number
        made.append((number, torch.from_numpy(room.labels)))
    done.set()
    thread.join()
    assert not wrong
