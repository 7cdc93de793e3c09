"""Matrices brought together from the ranks that hold parts of them, and their updates taken back.

ZeRO hands an optimizer flat fp32 tensors: parts of parameters, one after another. An optimizer that treats a weight as
a matrix (orthogonalises it, takes its SVD) needs it whole. Here each matrix has one owner; the other ranks send it
their parts, all matrices of a round in one collective, and get their parts of the updates back in another. A matrix
that lies on one rank, as most do at ZeRO stages 1 and 2, travels nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.errors import HeadraceError
from pretrain.distributed import Distributed

ROUND_ELEMENTS = 1 << 26
"""Elements of the matrices that a rank works on at a time, which bounds the memory besides the optimizer's state."""


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a matrix, row by row, and where a rank's optimizer holds them."""

    name: str
    """Of the parameter; of a stack of matrices, with the number of the matrix, as ``experts.gate[3]``."""
    shape: tuple[int, int]
    """Of the whole matrix [m, n]."""
    start: int
    """First element in the matrix."""
    length: int
    tensor: int = 0
    """Which of the unit's tensors holds it."""
    offset: int = 0
    """First element in that tensor."""

    @property
    def elements(self) -> int:
        """Of the whole matrix."""
        return self.shape[0] * self.shape[1]

    def read(self, tensor: Tensor) -> Tensor:
        """[length] elements of ``tensor``, which is like the one that holds the piece."""
        return tensor.reshape(-1)[self.offset : self.offset + self.length]

    def add(self, tensor: Tensor, values: Tensor, factor: float) -> None:
        """Add ``factor`` times ``values`` [length] in place."""
        tensor.view(-1)[self.offset : self.offset + self.length].add_(values.to(tensor.device), alpha=factor)


def pieces_of(
    name: str, shape: Sequence[int], start: int = 0, length: int | None = None, tensor: int = 0, offset: int = 0
) -> list[Piece]:
    """The pieces of matrices in ``length`` elements (None: all) of a parameter; a tensor holds them from ``offset`` on.

    Args:
        shape: of the whole parameter, [m, n], or [E, m, n] for a stack of matrices.
        start: the first of the elements in the parameter.
    """
    rows, columns = shape[-2:]
    size, end = rows * columns, math.prod(shape) if length is None else start + length
    pieces = []
    for number in range(start // size, -(-end // size)):
        first, last = max(start, number * size), min(end, (number + 1) * size)
        own = f"{name}[{number}]" if len(shape) == 3 else name
        place = offset + first - start
        pieces.append(Piece(own, (rows, columns), first - number * size, last - first, tensor, place))
    return pieces


@dataclass(frozen=True)
class Round:
    """What a rank does at a time: the matrices whose updates it computes, and what it sends and gets for them."""

    own: list[Piece]
    """This rank's pieces of the matrices that it owns."""
    leaving: list[list[Piece]]
    """For each other rank: this rank's pieces of the matrices that the other owns."""
    arriving: list[list[Piece]]
    """For each other rank: its pieces of the matrices that this rank owns."""
    is_shared: bool
    """Some rank has pieces of another's matrix, so that all ranks take part in the collectives."""


class MatrixUnit:
    """Tensors that an optimizer steps together, the matrices in them, and who computes which update.

    Collective: all ranks make their units in one order, and go through their rounds in one order.

    Args:
        tensors: this rank's, as the optimizer has them.
        pieces: what lies in ``tensors``. Together the ranks hold each element of a matrix once, or each rank holds all
            of every matrix.
        ranks: this process among those that hold pieces; updates are computed on its device.
        dtype: of matrices and updates on their way.
        spread: where each rank holds all, it computes a share of the updates for the others too; else all of them.
        round_elements: in a round no rank works on more elements of matrices, unless it is one matrix, or, where all
            hold all, all ranks together.

    Raises:
        HeadraceError: the pieces don't make up whole matrices.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        pieces: Sequence[Piece],
        ranks: Distributed,
        dtype: torch.dtype = torch.float32,
        spread: bool = True,
        round_elements: int = ROUND_ELEMENTS,
    ) -> None:
        self.tensors = list(tensors)
        self.device = ranks.device
        self.dtype = dtype
        self._ranks = ranks
        held = ranks.gather_objects(list(pieces))
        here = ranks.rank
        self._is_replicated = spread and _all_hold_all(held)
        if not spread and _all_hold_all(held):
            held, here = [held[here]], 0
        parts = _by_matrix(held)
        # what all ranks get of all others has to fit too
        limit = round_elements // ranks.world_size if self._is_replicated else round_elements
        self.rounds = _rounds(parts, _owners(parts, len(held)), here, len(held), limit)

    @property
    def homes(self) -> dict[str, Tensor]:
        """For each matrix that this rank owns, a tensor in which it lies, by name."""
        return {name: home for now in self.rounds for name, home in self.homes_in(now).items()}

    def homes_in(self, now: Round) -> dict[str, Tensor]:
        """The same of a round's matrices."""
        return {piece.name: self.tensors[piece.tensor] for piece in now.own}

    def gather(self, now: Round, read: Callable[[Piece], Tensor]) -> dict[str, Tensor]:
        """The matrices [m, n] that this rank owns in a round. Collective.

        Args:
            read: from one of this rank's pieces to its values [length], on the unit's device and in its dtype.
        """
        found = [(piece, read(piece)) for piece in now.own]
        if now.is_shared and not self._is_replicated:
            leaving = [[read(piece) for piece in to_rank] for to_rank in now.leaving]
            found += self._exchange(leaving, now.arriving)
        parts: dict[str, list[tuple[Piece, Tensor]]] = {}
        for piece, values in sorted(found, key=lambda part: part[0].start):
            parts.setdefault(piece.name, []).append((piece, values))
        return {
            name: (of_matrix[0][1] if len(of_matrix) == 1 else torch.cat([values for _, values in of_matrix])).view(
                of_matrix[0][0].shape
            )
            for name, of_matrix in parts.items()
        }

    def scatter(self, now: Round, updates: dict[str, Tensor]) -> Iterable[tuple[Piece, Tensor]]:
        """The updates [length] of all this rank's pieces in a round, from those [m, n] of what it owns. Collective."""
        flat = {name: update.reshape(-1) for name, update in updates.items()}
        found = [(piece, flat[piece.name][piece.start : piece.start + piece.length]) for piece in now.own]
        if now.is_shared and self._is_replicated:
            found += self._collect([values for _, values in found], now.leaving)
        elif now.is_shared:
            leaving = [
                [flat[piece.name][piece.start : piece.start + piece.length] for piece in of_rank]
                for of_rank in now.arriving
            ]
            found += self._exchange(leaving, now.leaving)
        return found

    def _exchange(self, leaving: list[list[Tensor]], arriving: list[list[Piece]]) -> list[tuple[Piece, Tensor]]:
        """Send values to each rank, and get those of the pieces from each."""
        sent = self._joined(values for to_rank in leaving for values in to_rank)
        sizes = [sum(piece.length for piece in of_rank) for of_rank in arriving]
        received = self._ranks.all_to_all(sent, [sum(map(len, to_rank)) for to_rank in leaving], sizes)
        return _parted(received, [piece for of_rank in arriving for piece in of_rank])

    def _collect(self, own: list[Tensor], arriving: list[list[Piece]]) -> list[tuple[Piece, Tensor]]:
        """Get the values of the pieces of each rank, which gives its own to all."""
        sent = self._joined(own)
        size = max(len(sent), *(sum(piece.length for piece in of_rank) for of_rank in arriving))
        received = self._ranks.all_gather(torch.cat([sent, sent.new_empty(size - len(sent))]))
        by_rank = received.view(self._ranks.world_size, size)
        return [found for values, pieces in zip(by_rank, arriving, strict=True) for found in _parted(values, pieces)]

    def _joined(self, values: Iterable[Tensor]) -> Tensor:
        return torch.cat([torch.empty(0, dtype=self.dtype, device=self.device), *values])


def _parted(values: Tensor, pieces: list[Piece]) -> list[tuple[Piece, Tensor]]:
    sizes = [piece.length for piece in pieces]
    return list(zip(pieces, torch.split(values[: sum(sizes)], sizes), strict=True))


def _all_hold_all(held: list[list[Piece]]) -> bool:
    """Whether each of several ranks holds every matrix whole."""
    whole = [{piece.name for piece in of_rank if piece.length == piece.elements} for of_rank in held]
    return len(held) > 1 and all(
        names == whole[0] and len(names) == len(of_rank) for names, of_rank in zip(whole, held, strict=True)
    )


Parts = dict[str, dict[int, list[Piece]]]
"""Matrix to rank to the pieces that it holds."""


def _by_matrix(held: list[list[Piece]]) -> Parts:
    parts: Parts = {}
    for rank, pieces in enumerate(held):
        for piece in pieces:
            parts.setdefault(piece.name, {}).setdefault(rank, []).append(piece)
    for name, by_rank in parts.items():
        pieces = sorted((piece for of_rank in by_rank.values() for piece in of_rank), key=lambda piece: piece.start)
        if all(sum(each.length for each in of_rank) == pieces[0].elements for of_rank in by_rank.values()):
            continue
        ends = [0, *(piece.start + piece.length for piece in pieces)]
        if ends[:-1] != [piece.start for piece in pieces] or ends[-1] != pieces[0].elements:
            raise HeadraceError(
                f"the ranks hold elements {[(piece.start, piece.start + piece.length) for piece in pieces]} of {name} "
                f"{list(pieces[0].shape)}, not each element once. This is a fault of the map of shards "
                "(pretrain.engine.shards); please report it."
            )
    return parts


def _owners(parts: Parts, world_size: int) -> dict[str, int]:
    """The rank that computes the update of each matrix: who holds more than half, else the least busy who holds any.

    How busy a rank is, is counted in s² l of an [s, l] matrix, s <= l: what products with its own transpose or a
    singular value decomposition cost.
    """

    def cost(name: str) -> int:
        short, long = sorted(next(iter(parts[name].values()))[0].shape)
        return short * short * long

    busy, owners = [0] * world_size, {}
    for name in sorted(parts, key=lambda name: -cost(name)):
        holds = {rank: sum(piece.length for piece in pieces) for rank, pieces in parts[name].items()}
        most = [rank for rank, length in holds.items() if 2 * length > parts[name][rank][0].elements]
        owners[name] = min(most or holds, key=lambda rank: (busy[rank], rank))
        busy[owners[name]] += cost(name)
    return owners


def _rounds(parts: Parts, owners: dict[str, int], here: int, world_size: int, limit: int) -> list[Round]:
    """The rounds of the rank ``here``: as many on every rank."""
    shared = {name for name, by_rank in parts.items() if len(by_rank) > 1}
    chunks: list[list[list[str]]] = [[] for _ in range(world_size)]
    room = [0] * world_size
    # what is shared comes first, so that few rounds have collectives
    for name in sorted(parts, key=lambda name: name not in shared):
        owner, elements = owners[name], next(iter(parts[name].values()))[0].elements
        if not chunks[owner] or elements > room[owner]:
            chunks[owner].append([])
            room[owner] = limit
        chunks[owner][-1].append(name)
        room[owner] -= elements
    return [
        _round(parts, [of_rank[number] if number < len(of_rank) else [] for of_rank in chunks], here, shared)
        for number in range(max(map(len, chunks)))
    ]


def _round(parts: Parts, owned: list[list[str]], here: int, shared: set[str]) -> Round:
    def held_by(rank: int, owner: int) -> list[Piece]:
        return [piece for name in owned[owner] for piece in parts[name].get(rank, [])]

    others = range(len(owned))
    return Round(
        own=held_by(here, here),
        leaving=[held_by(here, owner) if owner != here else [] for owner in others],
        arriving=[held_by(rank, here) if rank != here else [] for rank in others],
        is_shared=any(name in shared for names in owned for name in names),
    )
