"""One shard held against its row of the manifest, byte for byte: each cause of damage told once, where it lies."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from .errors import DataError
from .layout import SHARD_FOLDER, BlockLayout, index_entries, shard_path
from .manifest import Shard
from .shard_reading import documents_of, map_blocks
from .shards import misplaced_document

ARCHIVE, INDEX, TABLE = "tar", "idx", "docs.parquet"
"""The files of a shard."""

_REBUILT = " (`verify --rebuild-sidecars` writes it again)"

Found = TypeVar("Found")
Tokens = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Damage:
    """One thing that is not as the manifest says. ``offset`` counts bytes from the start of ``file``."""

    file: str
    problem: str
    shard: str | None = None
    block: int | None = None
    offset: int | None = None

    def __str__(self) -> str:
        block = "" if self.block is None else f", block {self.block}"
        offset = "" if self.offset is None else f", byte {self.offset}"
        return f"{self.file}{block}{offset}: {self.problem}"


@dataclass(frozen=True)
class ShardJob:
    """A shard to verify, and what its data set says of all shards."""

    folder: Path
    layout: BlockLayout
    vocab_size: int
    eos_id: int
    shard: Shard


@dataclass(frozen=True)
class Checked:
    """What was found in the files of a shard; ``strange``: the SHA-256 of those that are not as written, by name."""

    damage: list[Damage] = field(default_factory=list)
    strange: dict[str, str] = field(default_factory=dict)


class _Place(NamedTuple):
    """Something wrong in an archive. ``block`` is None behind the last one."""

    block: int | None
    offset: int | None
    problem: str


def verify_shard(job: ShardJob) -> Checked:
    """Hold the three files of a shard against the manifest, and, where they are as written, against each other."""
    return _Verification(job).run()


class _Verification:
    def __init__(self, job: ShardJob) -> None:
        self._job, self._shard, self._layout = job, job.shard, job.layout
        self._checked = Checked()

    def run(self) -> Checked:
        index = self._tried(INDEX, lambda: self._content(INDEX, self._shard.idx_sha256, _REBUILT))
        sound = self._tried(ARCHIVE, lambda: self._archive(index))
        table = self._tried(TABLE, lambda: self._content(TABLE, self._shard.docs_sha256))
        if sound and table is not None:
            self._tried(TABLE, lambda: self._compare(table))
        return self._checked

    def _tried(self, kind: str, check: Callable[[], Found]) -> Found | None:
        try:
            return check()
        except OSError as error:
            self._tell(kind, f"can't be read to its end: {error.strerror or error}")
            return None

    def _tell(self, kind: str, problem: str, block: int | None = None, offset: int | None = None) -> None:
        self._checked.damage.append(Damage(self._name(kind), problem, self._shard.name, block, offset))

    def _name(self, kind: str) -> str:
        return f"{SHARD_FOLDER}/{self._shard.name}.{kind}"

    def _content(self, kind: str, sha256: str, advice: str = "") -> bytes | None:
        """A file beside the archive, if it is there and as written."""
        path = self._job.folder / self._name(kind)
        if not path.is_file():
            self._tell(kind, f"missing{advice}")
            return None
        content = path.read_bytes()
        if (found := hashlib.sha256(content).hexdigest()) != sha256:
            self._checked.strange[self._name(kind)] = found
            self._tell(kind, f"SHA-256 is {found}, the manifest says {sha256}{advice}")
            return None
        return content

    def _archive(self, index: bytes | None) -> bool:
        """Whether the archive is as written. ``index``: the block index, if that is as written."""
        path = self._job.folder / self._name(ARCHIVE)
        if not path.is_file():
            self._tell(ARCHIVE, "missing")
            return False
        digest = hashlib.sha256()
        with open(path, "rb") as handle:
            places, strange_tokens = self._read(handle, digest, index, path.stat().st_size)
        sound = digest.hexdigest() == self._shard.sha256
        if not sound:
            self._checked.strange[self._name(ARCHIVE)] = digest.hexdigest()
        if sound or index is None:  # else tokens are strange because a block is damaged, which its CRC32C tells
            places += strange_tokens
        if not sound and not places:
            where = "" if index else ", in tokens of a block that can't be told without the block index"
            told = f"SHA-256 is {digest.hexdigest()}, the manifest says {self._shard.sha256}{where}"
            places.append(_Place(None, None, told))
        by_block: dict[int | None, list[_Place]] = {}
        for place in places:
            by_block.setdefault(place.block, []).append(place)
        for block, of_block in by_block.items():
            offset = min((place.offset for place in of_block if place.offset is not None), default=None)
            self._tell(ARCHIVE, "; ".join(place.problem for place in of_block), block, offset)
        return sound

    def _read(self, handle: BinaryIO, digest: Any, index: bytes | None, size: int) -> tuple[list[_Place], list[_Place]]:
        """What is wrong with the bytes of the archive, and with its tokens."""
        shard, layout = self._shard, self._layout
        expected = None if index is None else index_entries(index)["crc32c"]
        has = "" if size == shard.bytes else f": it has {size} bytes, the manifest says {shard.bytes}"
        places: list[_Place] = []
        tokens: list[_Place] = []
        look_ahead: int | None = None
        for block in range(shard.blocks):
            start = block * layout.member_stride
            member = handle.read(layout.member_stride)
            digest.update(member)
            if len(member) < layout.member_stride:
                return [*places, _Place(block, start + len(member), f"the file ends inside this block{has}")], tokens
            head, tail = layout.member_head(shard.name, block), layout.member_tail()
            data = member[len(head) : len(head) + layout.block_bytes]
            if (at := _first_difference(member[: len(head)], head)) is not None:
                places.append(_Place(block, start + at, "damaged tar or npy header"))
            if expected is not None and crc32c(data) != expected[block]:
                places.append(_Place(block, start + len(head), "CRC32C does not fit"))
            if (at := _first_difference(member[len(head) + len(data) :], tail)) is not None:
                places.append(_Place(block, start + len(head) + len(data) + at, "padding is not zero"))
            found = np.frombuffer(data, layout.token_dtype)
            tokens += self._strange_tokens(block, found, look_ahead)
            look_ahead = int(found[-1])
        end = handle.read()
        digest.update(end)
        if (at := _first_difference(end, layout.archive_end(shard.blocks))) is not None:
            offset = shard.blocks * layout.member_stride + at
            places.append(_Place(None, offset, f"the end of the archive is not as written{has}"))
        return places, tokens

    def _strange_tokens(self, block: int, tokens: Tokens, look_ahead: int | None) -> Iterator[_Place]:
        """What tokens of a block can't be; ``look_ahead``: the one that the block before ends with."""
        offset, item = self._layout.data_offset(block), self._layout.token_bytes
        if look_ahead not in (None, int(tokens[0])):
            yield _Place(block, offset, f"begins with token {tokens[0]}; the block before looks ahead to {look_ahead}")
        beyond = np.flatnonzero(tokens >= self._job.vocab_size)
        if len(beyond):
            problem = f"token {tokens[beyond[0]]} is beyond the vocabulary of {self._job.vocab_size}"
            yield _Place(block, offset + int(beyond[0]) * item, problem)
        valid = self._shard.tokens - block * self._layout.block_tokens
        filling = np.flatnonzero(tokens[valid:] != self._job.eos_id) if valid < len(tokens) else np.array([], np.int64)
        if len(filling):
            yield _Place(block, offset + (valid + int(filling[0])) * item, "the filling is not EOS")

    def _compare(self, content: bytes) -> None:
        """Hold the document table, whose ``content`` is as written, against the archive, which is so, too."""
        shard, path = self._shard, self._name(TABLE)
        try:
            table = documents_of(content, path, shard.docs_sha256)
        except DataError as error:
            self._tell(TABLE, str(error))
            return
        blocks = map_blocks(shard_path(self._job.folder, shard.name), self._layout, shard.blocks)
        tokens = blocks[:, :-1].reshape(-1)[: shard.tokens]
        if problem := next(self._disagreements(table, np.flatnonzero(tokens == self._job.eos_id)), None):
            self._tell(TABLE, problem)

    def _disagreements(self, table: Any, eos: npt.NDArray[np.int64]) -> Iterator[str]:
        """What the table, the shard with its EOS at ``eos`` and the manifest do not agree about; the first says why
        the others are."""
        shard = self._shard
        if table.num_rows != shard.documents:
            yield f"has {table.num_rows} rows, the manifest says {shard.documents} documents"
        starts, lengths = (table[name].to_numpy().astype(np.int64) for name in ("start", "length"))
        if (row := misplaced_document(eos, starts, lengths, shard.tokens)) is not None:
            said = f"tokens {starts[row]} to {starts[row] + lengths[row]}"
            yield f"row {row} says {said}, which the EOS of the shard do not"
        if len(eos) != shard.documents + shard.filling:
            filling = f" and {shard.filling} tokens of filling" if shard.filling else ""
            yield f"the shard holds {len(eos)} EOS, the manifest says {shard.documents} documents{filling}"
        if (text_bytes := int(table["text_bytes"].to_numpy().sum())) != shard.text_bytes:
            yield f"its text_bytes add up to {text_bytes}, the manifest says {shard.text_bytes}"
        if set(table["domain"].to_pylist()) - {shard.domain}:
            yield f"a row is not of domain {shard.domain}"


def _first_difference(found: bytes, expected: bytes) -> int | None:
    if found == expected:
        return None
    shared = min(len(found), len(expected))
    differs = np.frombuffer(found[:shared], np.uint8) != np.frombuffer(expected[:shared], np.uint8)
    return int(np.argmax(differs)) if differs.any() else shared
