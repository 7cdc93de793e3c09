"""Matrices that ranks hold in parts: gathered to one rank each, their updates taken back."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import HeadraceError
from pretrain.distributed import Distributed
from pretrain.optimizer.matrices import MatrixUnit, Piece, pieces_of
from tests.ranks import run_on_ranks

SHAPES = {"a": (4, 6), "b": (5, 3), "c": (2, 2), "d": (7, 1), "e": (3, 8)}
ALONE = Distributed(0, 1, torch.device("cpu"))


def whole(name: str) -> Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(ord(name)))


def cut(ranks: Distributed, gap: int = 0) -> tuple[list[Tensor], list[Piece]]:
    """As ZeRO 1 and 2: all one after another, a gap after each, in equal parts."""
    flat, begins = torch.zeros(0), {}
    for name in SHAPES:
        begins[name] = len(flat)
        flat = torch.cat([flat, whole(name).flatten(), torch.full((gap,), 9.0)])
    size = -(-len(flat) // ranks.world_size)
    here = ranks.rank * size
    pieces = []
    for name, begin in begins.items():
        first, last = max(begin, here), min(begin + whole(name).numel(), here + size)
        if first < last:
            pieces.append(Piece(name, SHAPES[name], first - begin, last - first, 0, first - here))
    held = torch.full((size,), 7.0)
    mine = flat[here : here + size]
    held[: len(mine)] = mine
    return [held], pieces


def split(ranks: Distributed) -> tuple[list[Tensor], list[Piece]]:
    """As ZeRO 3: each in parts of equal length, the last filled up."""
    parts, pieces, offset = [], [], 0
    for name, shape in SHAPES.items():
        flat = whole(name).flatten()
        share = -(-len(flat) // ranks.world_size)
        start = ranks.rank * share
        values = flat[start : start + share]
        if len(values):
            pieces.append(Piece(name, shape, start, len(values), 0, offset))
        parts.append(torch.cat([values, torch.full((share - len(values),), 7.0)]))
        offset += share
    return [torch.cat(parts)], pieces


def replicated(_: Distributed) -> tuple[list[Tensor], list[Piece]]:
    """As stage 0: every rank has all, each in a tensor of its own."""
    pieces = [Piece(name, SHAPES[name], 0, whole(name).numel(), i) for i, name in enumerate(SHAPES)]
    return [whole(name) for name in SHAPES], pieces


LAYOUTS = {"cut": cut, "cut with gaps": lambda ranks: cut(ranks, 3), "split": split, "replicated": replicated}


def doubled(unit: MatrixUnit, counted: list[int]) -> dict[str, Tensor]:
    """Add to every matrix itself, read from the parts; the matrices that this rank doubled."""
    owned = {}
    before = [tensor.clone() for tensor in unit.tensors]
    for now in unit.rounds:
        counted.append(now.is_shared)
        matrices = unit.gather(now, lambda piece: piece.read(before[piece.tensor]).to(unit.dtype))
        owned |= {name: matrix.clone() for name, matrix in matrices.items()}
        for piece, values in unit.scatter(now, matrices):
            piece.add(unit.tensors[piece.tensor], values, 1.0)
    return owned


def go_through() -> list[tuple[str, dict[str, Tensor], list[Tensor], int, int]]:
    import torch.distributed as dist

    from pretrain.distributed import start

    ranks, calls = start(60), 0
    plain_all_to_all, plain_all_gather = dist.all_to_all_single, dist.all_gather_single

    def counting(function: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            return function(*arguments, **options)

        return counted

    dist.all_to_all_single, dist.all_gather_single = counting(plain_all_to_all), counting(plain_all_gather)
    found = []
    for name, layout in LAYOUTS.items():
        for dtype in (torch.float32, torch.bfloat16):
            for limit in (1, 30, 1000):
                for spread in (True, False):
                    tensors, pieces = layout(ranks)
                    unit = MatrixUnit(tensors, pieces, ranks, dtype, spread, limit)
                    calls = 0
                    shared: list[int] = []
                    owned = doubled(unit, shared)
                    label = f"{name}, {dtype}, {limit}, {'spread' if spread else 'alone'}"
                    found.append((label, owned, tensors, calls, sum(shared)))
    return found


@pytest.fixture(scope="module")
def on_two_ranks() -> list[Any]:
    return run_on_ranks(go_through, 2)


def check_every_part(results: list[Any], world_size: int) -> None:
    for case in zip(*results, strict=True):
        label = case[0][0]
        dtype = torch.bfloat16 if "bfloat16" in label else torch.float32
        owners: dict[str, int] = {}
        for rank, (_, owned, tensors, _, _) in enumerate(case):
            for name, matrix in owned.items():
                owners[name] = owners.get(name, 0) + 1
                assert torch.equal(matrix, whole(name).to(dtype)), label
            expected, pieces = LAYOUTS[label.split(",")[0]](Distributed(rank, world_size, torch.device("cpu")))
            for piece in pieces:
                mine = whole(piece.name).flatten()[piece.start : piece.start + piece.length]
                piece.add(expected[piece.tensor], mine.to(dtype), 1.0)
            assert all(map(torch.equal, tensors, expected)), label
        everywhere = "replicated" in label and "alone" in label
        assert owners == dict.fromkeys(SHAPES, world_size if everywhere else 1), label


def test_every_part_gets_the_update_of_the_whole(on_two_ranks: list[Any]) -> None:
    check_every_part(on_two_ranks, 2)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 4])
def test_every_part_gets_the_update_of_the_whole_on_other_ranks(world_size: int) -> None:
    check_every_part(run_on_ranks(go_through, world_size), world_size)


def test_few_collectives_and_only_for_what_is_shared(on_two_ranks: list[Any]) -> None:
    """A round has one there and one back, or one for what all hold; a matrix that lies on one rank has none."""
    for label, _, _, calls, shared in on_two_ranks[0]:
        if label.startswith("cut with gaps") or ("replicated" in label and "alone" in label):
            assert calls == shared == 0, label
        elif "1000" in label:
            assert (calls, shared) == (1 if "replicated" in label else 2, 1), label
        elif label.startswith("cut"):
            # one of the five matrices is cut, and its round comes first
            assert (calls, shared) == (2, 1), label


def test_a_matrix_travels_to_who_holds_most_of_it() -> None:
    # 74 elements on 2 ranks: rank 0 has all of a, and 13 of the 15 of b
    class Two(Distributed):
        def gather_objects(self, item: Any) -> list[Any]:
            return [cut(Two(rank, 2, self.device))[1] for rank in range(2)]

    for rank, names, leaving in ((0, ["b", "a"], 0), (1, ["c", "d", "e"], 2)):
        ranks = Two(rank, 2, torch.device("cpu"))
        (only,) = MatrixUnit(*cut(ranks), ranks).rounds
        assert [piece.name for piece in only.own] == names
        assert sum(piece.length for to_rank in only.leaving for piece in to_rank) == leaving


def test_no_rank_gets_more_than_its_share() -> None:
    """Where all hold all, the work of equal matrices is divided evenly."""
    pieces = [Piece(f"m{i}", (4, 4), 0, 16, i) for i in range(7)]

    class Four(Distributed):
        def gather_objects(self, item: Any) -> list[Any]:
            return [item] * 4

    counts = []
    for rank in range(4):
        ranks = Four(rank, 4, torch.device("cpu"))
        unit = MatrixUnit([torch.zeros(4, 4)] * 7, pieces, ranks)
        counts.append(sum(len(now.own) for now in unit.rounds))
        # and what all ranks get of a round is bounded, not what each gives
        bounded = MatrixUnit([torch.zeros(4, 4)] * 7, pieces, ranks, round_elements=64)
        assert [len(now.own) for now in bounded.rounds] == [1, int(rank < 3)]
    assert sorted(counts) == [1, 2, 2, 2]


def test_rounds_bound_what_a_rank_works_on() -> None:
    pieces = [Piece(f"m{i}", (4, 4), 0, 16, i) for i in range(5)]
    unit = MatrixUnit([torch.zeros(4, 4)] * 5, pieces, ALONE, round_elements=40)
    assert [len(now.own) for now in unit.rounds] == [2, 2, 1]
    unit = MatrixUnit([torch.zeros(4, 4)] * 5, pieces, ALONE, round_elements=8)
    assert [len(now.own) for now in unit.rounds] == [1] * 5


@pytest.mark.parametrize("held", [[(0, 12)], [(5, 24)], [(0, 10), (12, 24)], [(0, 14), (12, 24)]])
def test_parts_that_make_no_whole_are_refused(held: list[tuple[int, int]]) -> None:
    pieces = [Piece("a", (4, 6), start, stop - start, 0, start) for start, stop in held]
    with pytest.raises(HeadraceError, match=re.escape(f"elements {held} of a [4, 6], not each element once")):
        MatrixUnit([torch.zeros(24)], pieces, ALONE)


def test_a_stack_is_as_many_matrices() -> None:
    """Elements 5 to 20 of [3, 2, 4]: the end of the first matrix, the second, the beginning of the third."""
    pieces = pieces_of("x", (3, 2, 4), 5, 15, tensor=2, offset=100)
    assert pieces == [
        Piece("x[0]", (2, 4), 5, 3, 2, 100),
        Piece("x[1]", (2, 4), 0, 8, 2, 103),
        Piece("x[2]", (2, 4), 0, 4, 2, 111),
    ]
    assert pieces_of("x", (2, 4)) == [Piece("x", (2, 4), 0, 8, 0, 0)]
