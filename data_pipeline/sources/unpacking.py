"""Packed streams: gzip and zstd of any number of members or frames, with a cut or damaged end told."""

from __future__ import annotations

import gzip
import io
import zlib
from typing import TYPE_CHECKING, BinaryIO, Final, Literal

import zstandard

if TYPE_CHECKING:
    from typing_extensions import Buffer

Packing = Literal["gzip", "zstd"]

DAMAGE: Final = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)
"""What reading an unpacked stream raises where the packed one is cut or damaged."""

_SUFFIXES: Final[dict[str, Packing]] = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd"}
SUFFIXES: Final[dict[Packing, str]] = {"gzip": ".gz", "zstd": ".zst"}
"""What the names of packed files should end in."""

_FOREIGN: Final = {
    b"\xfd7zXZ\x00": "xz",
    **{b"BZh%d1AY&SY" % level: "bzip2" for level in range(1, 10)},
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
}
"""The first bytes of packings that are not read, none of them the beginning of a text, JSON or tar."""

_SKIPPABLE: Final = b"\x2a\x4d\x18"
"""Bytes 1 to 3 of a zstd frame that holds no content."""

_BUFFER_BYTES: Final = 1 << 20
_LARGEST_WINDOW: Final = 1 << 31
"""What `zstd --long=31`, the most there is, asks of a reader; memory is only taken for what a frame really says."""


def packing_of_name(name: str) -> Packing | None:
    """How a file is packed, by the end of its name; an address's ``?query`` and ``#fragment`` do not count."""
    if "://" in name:
        name = name.split("?", 1)[0].split("#", 1)[0]
    return next((packing for suffix, packing in _SUFFIXES.items() if name.lower().endswith(suffix)), None)


def name_unpacked(name: str) -> str:
    """``name`` in lower case without the end that says how the file is packed."""
    name = name.lower()
    if name.endswith(".tgz"):
        return f"{name.removesuffix('.tgz')}.tar"
    return next((name.removesuffix(suffix) for suffix in _SUFFIXES if name.endswith(suffix)), name)


def packing_of_content(head: bytes) -> Packing | None:
    """How a stream is packed, by its first bytes (gzip: RFC 1952; zstd: RFC 8878, skippable frames included)."""
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == _SKIPPABLE and 0x50 <= head[0] <= 0x5F):
        return "zstd"
    return None


def foreign_packing(head: bytes) -> str | None:
    """The packing of a stream that begins with ``head`` (at least 6 bytes), if it is one that is not read here."""
    return next((name for start, name in _FOREIGN.items() if head.startswith(start)), None)


def carries_checksum(packing: Packing, stream: BinaryIO) -> bool:
    """Whether the beginning of a packed stream says that a checksum of its content follows, as it always does in gzip
    (zstd: bit 2 of the first frame's descriptor, RFC 8878, 3.1.1.1.1). What is cut or damaged there says so, too: it is
    told when it is read."""
    if packing == "gzip":
        return True
    while (head := stream.read(8))[1:4] == _SKIPPABLE and len(head) == 8:
        stream.seek(int.from_bytes(head[4:], "little"), io.SEEK_CUR)
    return len(head) < 8 or bool(head[4] & 4)


def unpacked(stream: BinaryIO, packing: Packing) -> BinaryIO:
    """The unpacked content of ``stream``; reading it may raise one of :data:`DAMAGE`."""
    if packing == "gzip":
        return gzip.GzipFile(fileobj=stream)  # type: ignore[return-value]  # a BinaryIO but for its name
    return io.BufferedReader(_ZstdFrames(stream), _BUFFER_BYTES)


class _ZstdFrames(io.RawIOBase):
    """Frame after frame. `zstandard`'s own stream reader takes a cut frame for the end of the stream."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self._stream = stream
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._packed = b""
        self._ready = memoryview(b"")
        self._position = 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, target: Buffer) -> int:
        view = memoryview(target)
        while not self._ready:
            if self._packed or (packed := self._stream.read(1 << 17)):
                self._ready = memoryview(self._decompress(self._packed or packed))
            elif self._frame is None:
                return 0
            else:
                raise EOFError("the last zstd frame is cut off")
        size = min(len(view), len(self._ready))
        view[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        self._position += size
        return size

    def _decompress(self, packed: bytes) -> bytes:
        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
        content = self._frame.decompress(packed)
        self._packed = b""
        if self._frame.eof:
            self._packed = self._frame.unused_data
            self._frame = None
        return content
