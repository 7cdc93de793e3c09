"""The rows of a manifest: one per shard, kept as columns, because a data set may have 10^5 of them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from .arrow import numbers, strings, values
from .settings import Settings

TRAIN = "train"
HELDOUT = "heldout"
SPLITS = (TRAIN, HELDOUT)

_COUNTS = ("bytes", "blocks", "tokens", "filling", "documents", "text_bytes")
_HASHES = ("sha256", "idx_sha256", "docs_sha256")
_HASH_BYTES = 32
_NAME_BYTES = 6
_SEEN = ("name", "domain", "split", "blocks", "tokens", "sha256")
"""The columns that a training run can see: the data set's identity covers them."""

_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("domain", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("split", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        *(pa.field(name, pa.int64(), nullable=False) for name in _COUNTS),
        pa.field("first_key", pa.uint64(), nullable=False),
        *(pa.field(name, pa.binary(_HASH_BYTES), nullable=False) for name in _HASHES),
    ]
)


class Shard(Settings):
    """One archive: documents of one domain and one split."""

    name: str = Field(pattern=r"^\d{6}$", description="Six digits; the archive is shards/NAME.tar.")
    domain: str = Field(min_length=1)
    split: Literal["train", "heldout"]
    bytes: int = Field(gt=0, description="Size of the archive in bytes.")
    blocks: int = Field(gt=0, description="Members of the archive.")
    tokens: int = Field(
        gt=0,
        description="Length of the token stream: the documents, each with its EOS, and the filling between them. "
        "What fills up the last block is left out.",
    )
    filling: int = Field(default=0, ge=0, description="EOS that fill up rows of best-fit packing; part of `tokens`.")
    documents: int = Field(gt=0)
    text_bytes: int = Field(ge=0, description="UTF-8 bytes of the documents' text.")
    first_key: int = Field(
        ge=0,
        lt=1 << 64,
        description="The smallest shuffle key of its documents. In the shards of one domain and split, in name order, "
        "keys ascend, so that a document's shard is found by its key.",
    )
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of the archive.")
    idx_sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of the block index.")
    docs_sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of the document table.")


class ShardTable(Sequence[Shard]):
    """The shards of a data set, or some of them, in name order; a row is made when asked for.

    Attributes:
        domains: the names of the domains, sorted; ``domain_codes`` [n] int32 are places in it.
        split_codes: [n] int32, places in :data:`SPLITS`.
        bytes, blocks, tokens, filling, documents, text_bytes: [n] int64.
        first_key: [n] uint64.
        sha256, idx_sha256, docs_sha256: [n, 32] uint8.
        All as in :class:`Shard`; arrays are read-only.
    """

    domains: tuple[str, ...]
    domain_codes: npt.NDArray[np.int32]
    split_codes: npt.NDArray[np.int32]
    bytes: npt.NDArray[np.int64]
    blocks: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    filling: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]
    text_bytes: npt.NDArray[np.int64]
    first_key: npt.NDArray[np.uint64]
    sha256: npt.NDArray[np.uint8]
    idx_sha256: npt.NDArray[np.uint8]
    docs_sha256: npt.NDArray[np.uint8]

    def __init__(self, names: npt.NDArray[np.bytes_], domains: Sequence[str], columns: dict[str, npt.NDArray[Any]]):
        """Take columns as they are (see the attributes); :meth:`of` and :func:`read_table` make them."""
        codes = columns["domain_codes"]
        used, renumbered = np.unique(codes, return_inverse=True)
        present = [domains[code] for code in used.tolist()]
        self.domains = tuple(sorted(present))
        places = np.array([self.domains.index(domain) for domain in present], np.int32)
        self._names = names
        for name, column in {**columns, "domain_codes": places[renumbered]}.items():
            column.flags.writeable = False
            setattr(self, name, column)

    @classmethod
    def of(cls, rows: Sequence[Shard]) -> ShardTable:
        """The table of ``rows``, which are in name order."""
        if isinstance(rows, cls):
            return rows
        domains = sorted({row.domain for row in rows})
        columns: dict[str, npt.NDArray[Any]] = {
            "domain_codes": np.array([domains.index(row.domain) for row in rows], np.int32),
            "split_codes": np.array([SPLITS.index(row.split) for row in rows], np.int32),
            "first_key": np.array([row.first_key for row in rows], np.uint64),
        }
        for name in _COUNTS:
            columns[name] = np.array([getattr(row, name) for row in rows], np.int64)
        for name in _HASHES:
            joined = b"".join(bytes.fromhex(getattr(row, name)) for row in rows)
            columns[name] = np.frombuffer(joined, np.uint8).reshape(len(rows), _HASH_BYTES).copy()
        return cls(np.array([row.name for row in rows], f"S{_NAME_BYTES}"), domains, columns)

    def check(self) -> None:
        """Hold all rows against what :class:`Shard` and the order of a table ask for.

        Raises:
            ValueError: names the first row that does not fit.
        """
        characters = self._names.view(np.uint8).reshape(len(self), _NAME_BYTES)
        rules = [
            ("name is not six digits", ((characters < ord("0")) | (characters > ord("9"))).any(axis=1)),
            ("name does not come after the one before", np.r_[False, self._names[1:] <= self._names[:-1]][: len(self)]),
            *((f"{name} is not above 0", getattr(self, name) <= 0) for name in ("bytes", "blocks", "tokens")),
            ("documents is not above 0", self.documents <= 0),
            ("text_bytes is below 0", self.text_bytes < 0),
            ("filling is not from 0 to tokens - documents", self._impossible_filling()),
        ]
        for problem, wrong in rules:
            if wrong.any():
                row = int(np.argmax(wrong))
                raise ValueError(f"row {row} (shard {self._names[row].decode('latin-1')!r}): {problem}")

    def _impossible_filling(self) -> npt.NDArray[np.bool_]:
        wrong: npt.NDArray[np.bool_] = (self.filling < 0) | (self.filling > self.tokens - self.documents)
        return wrong

    @cached_property
    def names(self) -> list[str]:
        """The names of the shards."""
        found: list[str] = self._names.astype(f"U{_NAME_BYTES}").tolist()
        return found

    def update_digest(self, digest: Any) -> None:
        """Feed everything that a training run can see to a ``hashlib`` object, as columns."""
        seen: dict[str, npt.NDArray[Any]] = {
            "name": self._names,
            "domain": self.domain_codes.astype("<i4", copy=False),
            "split": self.split_codes.astype("<i4", copy=False),
            "blocks": self.blocks.astype("<i8", copy=False),
            "tokens": self.tokens.astype("<i8", copy=False),
            "sha256": self.sha256,
        }
        digest.update(f"{len(self)} shards; domains {list(self.domains)!r}; splits {list(SPLITS)!r}".encode())
        for name in _SEEN:
            digest.update(f";{name}:".encode())
            digest.update(np.ascontiguousarray(seen[name]).view(np.uint8).data)

    def take(self, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.integer[Any]] | slice) -> ShardTable:
        """The rows that a mask, ascending row numbers or a slice name."""
        columns = {name: getattr(self, name)[chosen] for name in (*_COUNTS, "first_key", *_HASHES)}
        columns |= {"domain_codes": self.domain_codes[chosen], "split_codes": self.split_codes[chosen]}
        return ShardTable(self._names[chosen], self.domains, columns)

    def totals(self) -> list[dict[str, Any]]:
        """Per (domain, split) that has shards, domains sorted: ``shards``, ``documents``, ``tokens``, ``filling``,
        ``text_bytes`` and ``bytes``."""
        found: list[dict[str, Any]] = []
        for code, domain in enumerate(self.domains):
            for place, split in enumerate(SPLITS):
                rows = (self.domain_codes == code) & (self.split_codes == place)
                if rows.any():
                    keys = ("documents", "tokens", "filling", "text_bytes", "bytes")
                    sums = {key: int(getattr(self, key)[rows].sum()) for key in keys}
                    found.append({"domain": domain, "split": split, "shards": int(rows.sum()), **sums})
        return found

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Shard: ...
    @overload
    def __getitem__(self, index: slice) -> ShardTable: ...
    def __getitem__(self, index: int | slice) -> Shard | ShardTable:
        if isinstance(index, slice):
            return self.take(index)
        row = range(len(self))[index]
        values: dict[str, Any] = {
            "name": self._names[row].decode(),
            "domain": self.domains[self.domain_codes[row]],
            "split": SPLITS[self.split_codes[row]],
            "first_key": int(self.first_key[row]),
        }
        values |= {name: int(getattr(self, name)[row]) for name in _COUNTS}
        values |= {name: getattr(self, name)[row].tobytes().hex() for name in _HASHES}
        return Shard.model_construct(**values)

    def __iter__(self) -> Iterator[Shard]:
        return (self[row] for row in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ShardTable):
            return NotImplemented
        columns = ("_names", "domain_codes", "split_codes", *_COUNTS, "first_key", *_HASHES)
        return self.domains == other.domains and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in columns
        )

    def __hash__(self) -> int:
        digest = hashlib.sha256()
        self.update_digest(digest)
        return int.from_bytes(digest.digest()[:8], "little")

    def __repr__(self) -> str:
        return f"ShardTable({len(self)} shards of {', '.join(self.domains)})"


def read_table(content: bytes) -> ShardTable:
    """The table that :func:`table_bytes` wrote.

    Raises:
        ValueError: not such a file, or its rows can't be those of a data set; says what is wrong.
    """
    try:
        # one column after another: a third of the memory. pq.read_table would import pandas, which takes 0.3 s
        file = pq.ParquetFile(pa.BufferReader(content), pre_buffer=False)
        if file.schema_arrow.remove_metadata() != _SCHEMA:
            raise ValueError("its columns are not those of a shard table")

        def column(name: str) -> Any:
            array = file.read([name], use_threads=False)[name].combine_chunks()
            if array.null_count:
                raise ValueError(f"column {name!r} has rows without a value")
            return array

        domains, splits = column("domain"), column("split")
        names = values(column("name").cast(pa.binary()).cast(pa.binary(_NAME_BYTES)), f"S{_NAME_BYTES}")
        columns = {name: values(column(name), np.int64) for name in _COUNTS}
        columns["first_key"] = values(column("first_key"), np.uint64)
        for name in _HASHES:
            columns[name] = values(column(name), f"V{_HASH_BYTES}").view(np.uint8).reshape(-1, _HASH_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"it is not a parquet file ({error})") from error
    known = splits.dictionary.to_pylist()
    if not set(known) <= set(SPLITS):
        raise ValueError(f"splits {sorted(known)} are not among {', '.join(SPLITS)}")
    columns["split_codes"] = np.array([SPLITS.index(split) for split in known], np.int32)[
        values(splits.indices, np.int32)
    ]
    columns["domain_codes"] = values(domains.indices, np.int32)
    made = ShardTable(names, domains.dictionary.to_pylist(), columns)
    made.check()
    return made


def _encoded(codes: npt.NDArray[np.int32], known: Sequence[str]) -> Any:
    return pa.DictionaryArray.from_arrays(numbers(codes, pa.int32()), strings([name.encode() for name in known]))


def table_bytes(table: ShardTable) -> bytes:
    """``table`` as a parquet file; equal tables give equal bytes (under one version of pyarrow)."""
    arrays = {
        "name": strings([name.encode() for name in table.names]),
        "domain": _encoded(table.domain_codes, table.domains),
        "split": _encoded(table.split_codes, SPLITS),
        "first_key": numbers(table.first_key, pa.uint64()),
        **{name: numbers(getattr(table, name), pa.int64()) for name in _COUNTS},
        **{name: numbers(getattr(table, name), pa.binary(_HASH_BYTES)) for name in _HASHES},
    }
    columns = pa.table([arrays[name] for name in _SCHEMA.names], schema=_SCHEMA)
    sink = io.BytesIO()
    compression = {name: "none" if name in _HASHES else "zstd" for name in _SCHEMA.names}
    pq.write_table(columns, sink, 1 << 14, compression=compression, use_dictionary=["domain", "split"])
    return sink.getvalue()
