"""Header blocks of tars: POSIX USTAR and pax, GNU, and the V7 form before them.

Formats: POSIX.1-2001 `pax`, sections "ustar Interchange Format" and "pax Extended Header"; GNU tar manual, "Basic Tar
Format". Only what decides names and bounds is taken out of a header; its checksum guards the rest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from ..errors import DataError

BLOCK_BYTES: Final = 512
ZERO_BLOCK: Final = bytes(BLOCK_BYTES)

FILE: Final = "file"
FOLDER: Final = "folder"
HARD_LINK: Final = "hard link"
SYMBOLIC_LINK: Final = "symbolic link"
SPECIAL_FILE: Final = "special file"
LONG_NAME: Final = "long name"
LONG_LINK: Final = "long link name"
PAX: Final = "pax header"
PAX_GLOBAL: Final = "global pax header"

_KINDS: Final = {
    b"0": FILE,
    b"\0": FILE,
    b"7": FILE,  # contiguous: a hint to the file system only
    b"1": HARD_LINK,
    b"2": SYMBOLIC_LINK,
    b"3": SPECIAL_FILE,
    b"4": SPECIAL_FILE,
    b"5": FOLDER,
    b"6": SPECIAL_FILE,
    b"L": LONG_NAME,
    b"K": LONG_LINK,
    b"x": PAX,
    b"g": PAX_GLOBAL,
}
_CHECKSUM: Final = slice(148, 156)
_OCTAL: Final = re.compile(rb" *([0-7]*)[ \0]*")
_PAX_LENGTH: Final = re.compile(rb"([1-9][0-9]{0,9}) ")


class TarError(DataError):
    """A tar that is damaged or not understood, at byte ``offset`` of the unpacked archive ``where``."""

    def __init__(self, where: str, offset: int, problem: str) -> None:
        super().__init__(f"{where}, byte {offset}: {problem}")
        self.where = where
        self.offset = offset
        self.problem = problem

    def __reduce__(self) -> tuple[type[TarError], tuple[str, int, str]]:
        return type(self), (self.where, self.offset, self.problem)  # errors travel from worker processes


@dataclass(frozen=True, slots=True)
class Header:
    """What one header block says. ``size`` counts payload bytes; kinds other than files and extensions have none."""

    name: str
    kind: str
    size: int
    link: str


def parse_header(block: bytes, where: str, offset: int) -> Header:
    """The header in a block of 512 bytes that is not all zero.

    Raises:
        TarError: a checksum that does not fit the block, a field that is no number, a kind that is not understood.
    """
    said = _octal(block[_CHECKSUM])
    if said is None or said != sum(block) - sum(block[_CHECKSUM]) + 8 * ord(" "):
        other = "damaged here, or before by bytes lost or added" if offset else "no tar, or damaged"
        raise TarError(
            where,
            offset,
            f"the checksum of the tar header here does not fit: the file is {other}. Fetch or write it again.",
        )
    size = _size(block[124:136])
    if size is None:
        raise TarError(where, offset, f"the size field {block[124:136]!r} is no number. Write the archive again.")
    kind = _KINDS.get(block[156:157])
    if kind is None:
        raise TarError(
            where,
            offset,
            f"member type {block[156:157]!r} (sparse, multi-volume or a vendor's own) is not understood. "
            "Write the archive again without it.",
        )
    name = _text(block[:100])
    # GNU headers, with another magic, keep times where POSIX ones keep the front of a long name.
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    if prefix:
        name = f"{prefix}/{name}"
    if block[156:157] == b"\0" and name.endswith("/"):
        kind = FOLDER
    if kind == FOLDER:
        name = name.rstrip("/")
    has_payload = kind in (FILE, LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL)
    return Header(name, kind, size if has_payload else 0, _text(block[157:257]))


def parse_pax(content: bytes, where: str, offset: int) -> dict[str, str]:
    """The records ``length key=value\\n`` of a pax header whose payload begins at ``offset``; later ones win.

    Raises:
        TarError: a record whose length or form is wrong, or a sparse file.
    """
    records: dict[str, str] = {}
    position = 0
    while position < len(content):
        length = _PAX_LENGTH.match(content, position)
        stop = position + int(length[1]) if length else 0
        key, equals, value = content[length.end() if length else 0 : stop].partition(b"=")
        if not length or stop > len(content) or not equals or not key or value[-1:] != b"\n":
            raise TarError(
                where, offset + position, "a pax record's length or form is wrong. Fetch or write the archive again."
            )
        if key.startswith(b"GNU.sparse."):
            raise TarError(where, offset, "sparse files are not understood. Write the archive again without --sparse.")
        records[_decode(key)] = _decode(value[:-1])
        position = stop
    return records


def pax_size(value: str, where: str, offset: int) -> int:
    """The number in a pax ``size`` record.

    Raises:
        TarError: not a decimal number.
    """
    if not (value.isascii() and value.isdigit()):
        raise TarError(where, offset, f"the pax record size={value!r} is no number. Write the archive again.")
    return int(value)


def _octal(field: bytes) -> int | None:
    match = _OCTAL.fullmatch(field)
    return int(match[1] or b"0", 8) if match else None


def _size(field: bytes) -> int | None:
    if field[0] == 0x80:  # base 256, GNU's and star's for 8 GiB and more; 0xff would begin a negative number
        return int.from_bytes(field[1:], "big")
    return _octal(field)


def _text(field: bytes) -> str:
    return _decode(field.split(b"\0", 1)[0])


def _decode(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")
