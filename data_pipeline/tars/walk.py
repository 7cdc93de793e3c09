"""Walking a tar from its first byte to its last, so that nothing of it is missed in silence.

Most tar readers take a header that does not fit its checksum, or a file that just ends, for the end of the archive
and say nothing (Python's `tarfile` after the first member, and what is built on it). Here each of these is an
error that names the byte: a wrong checksum, zeros over a header, a cut in a header, in a payload or between two
members, an end without the two zero blocks that end an archive, anything but zeros after them.

What a tar cannot betray: a flipped bit inside a payload, for only headers have checksums. A ``.json.gz`` field or a
packed archive (``.tar.gz``) has a CRC of its own, and broken UTF-8 or JSON is noticed by whoever decodes it; any
other flip passes. Nor can zeros over whole last members be told from padding, unless they are more than any tar
pads with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

from . import headers
from .headers import BLOCK_BYTES, ZERO_BLOCK, TarError, parse_header, parse_pax, pax_size

_CHUNK_BYTES: Final = 1 << 20
_LARGEST_EXTENSION: Final = 1 << 20
_LARGEST_PADDING: Final = 1 << 20
"""Bytes of zeros after the members: `tar` pads to 10 KiB unless told otherwise, and hardly ever to more than this."""


class Readable(Protocol):
    """A binary stream; nothing but `read` is used, and short reads are fine before the end."""

    def read(self, size: int = ..., /) -> bytes: ...


@dataclass(slots=True)
class Member:
    """One member: ``offset`` is the first byte of its headers, ``size`` the bytes of its payload."""

    name: str
    kind: str
    link: str
    offset: int
    size: int
    _reader: _Reader = field(repr=False)
    _begin: int = field(repr=False)

    def read(self) -> bytes:
        """The payload; only once, and only before the walk goes on to the next member.

        Raises:
            TarError: the archive ends inside the payload.
        """
        if self._reader.position != self._begin:
            raise ValueError(f"{self.name}: a member is read once, before the next")
        return self._reader.exactly(self.size, f"the payload of {self.name!r} ({self.size} bytes)")


def walk_tar(stream: Readable, where: str) -> Iterator[Member]:
    """The members of a tar in their order, folders and links included; read to the last byte of ``stream``.

    Long names of GNU tar and pax headers are applied, not yielded. ``where`` names the archive in errors.

    Raises:
        TarError: any damage described above; names the byte.
    """
    reader = _Reader(stream, where)
    defaults: dict[str, str] = {}
    own: dict[str, str] = {}
    first: int | None = None  # where the headers of the next member begin
    while True:
        offset = reader.position
        block = reader.header()
        if block == ZERO_BLOCK:
            if first is not None:
                raise TarError(
                    where, first, "a long name or pax header without its member. Fetch or write the archive again."
                )
            reader.end(offset)
            return
        header = parse_header(block, where, offset)
        first = offset if first is None else first
        if header.kind in (headers.LONG_NAME, headers.LONG_LINK, headers.PAX, headers.PAX_GLOBAL):
            found = _extension(reader, header)
            if header.kind == headers.PAX_GLOBAL:
                defaults |= found
                first = None if first == offset else first
            else:
                own = found | own
            continue
        records = {**defaults, **own}
        size = header.size
        if header.kind == headers.FILE and records.get("size"):
            size = pax_size(records["size"], where, first)
        name = records.get("path") or header.name
        name = name.rstrip("/") if header.kind == headers.FOLDER else name
        begin = reader.position
        yield Member(name, header.kind, records.get("linkpath") or header.link, first, size, reader, begin)
        reader.skip(begin + size - reader.position, f"the payload of {name!r} ({size} bytes)")
        reader.skip(-size % BLOCK_BYTES, f"the padding after {name!r}")
        own, first = {}, None


def _extension(reader: _Reader, header: headers.Header) -> dict[str, str]:
    """The records of a pax header, or a GNU long name as the pax record that means the same."""
    begin = reader.position
    if header.size > _LARGEST_EXTENSION:
        raise TarError(
            reader.where, begin - BLOCK_BYTES, f"a {header.kind} of {header.size} bytes. Write the archive again."
        )
    content = reader.exactly(header.size, f"a {header.kind}")
    reader.skip(-header.size % BLOCK_BYTES, f"the padding after a {header.kind}")
    if header.kind in (headers.PAX, headers.PAX_GLOBAL):
        return parse_pax(content, reader.where, begin)
    text = content.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    return {"path" if header.kind == headers.LONG_NAME else "linkpath": text}


class _Reader:
    """Exact reads that know their place."""

    def __init__(self, stream: Readable, where: str) -> None:
        self.stream = stream
        self.where = where
        self.position = 0

    def header(self) -> bytes:
        offset = self.position
        block = self._up_to(BLOCK_BYTES)
        if len(block) == BLOCK_BYTES:
            return block
        inside = f"{len(block)} bytes into a header" if block else "between two members"
        raise self._cut(f"{inside}, without the two zero blocks that end an archive", offset)

    def exactly(self, size: int, what: str) -> bytes:
        content = self._up_to(size)
        if len(content) < size:
            raise self._cut(f"inside {what}")
        return content

    def skip(self, size: int, what: str) -> None:
        while size > 0:
            size -= len(self.exactly(min(size, _CHUNK_BYTES), what))

    def end(self, offset: int) -> None:
        """Read the rest, which must be the second zero block and padding; ``offset``: of the first zero block."""
        if self.header() != ZERO_BLOCK:
            raise TarError(
                self.where,
                offset,
                "one block of zeros and then more, where a header or two blocks of zeros should be: "
                "zeros were written over a header. Fetch or write the archive again.",
            )
        while chunk := self._up_to(_CHUNK_BYTES):
            if chunk.count(0) != len(chunk):
                position = self.position - len(chunk.lstrip(b"\0"))
                raise TarError(
                    self.where,
                    offset,
                    f"the archive ends here, but byte {position} is not zero: zeros were written over "
                    "headers, or archives were joined. Fetch or write the archive again.",
                )
            if self.position - offset > _LARGEST_PADDING:
                raise TarError(
                    self.where,
                    offset,
                    f"more than {_LARGEST_PADDING} bytes of zeros where the archive ends: its tail was never written, "
                    "or zeros were written over it. Fetch or write it again.",
                )

    def _up_to(self, size: int) -> bytes:
        content = self.stream.read(size)
        if 0 < len(content) < size:
            pieces = [content]
            missing = size - len(content)
            while missing and (content := self.stream.read(missing)):
                pieces.append(content)
                missing -= len(content)
            content = b"".join(pieces)
        self.position += len(content)
        return content

    def _cut(self, inside: str, offset: int | None = None) -> TarError:
        return TarError(
            self.where,
            self.position if offset is None else offset,
            f"the archive is cut off: it ends {inside}. Fetch or write it again.",
        )
