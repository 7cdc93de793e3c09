"""The running Python's own standard library: text that is always there, for the demo and for tests."""

from __future__ import annotations

import ast
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..errors import UserError
from ..storage import StorageSettings
from .base import Document, Part, Rejected, Source, Span, whole_files
from .inputs import DEFAULT_STORAGE

_LEFT_OUT = frozenset(
    # Tests, what is not the library's own, and generated tables of characters and topics.
    ["test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "encodings", "pydoc_data"]
)
_TOPICS = "pydoc:topics"
_SHORTEST_DOCSTRING = 80


class StdlibSource(Source):
    """Source code or documentation of the running interpreter's standard library."""

    kind: Literal["stdlib"]
    part: Literal["code", "docs"] = Field(
        description="`code`: the modules' sources without tests; `docs`: pydoc's topics, then the docstrings of more "
        "than 80 characters of the same modules."
    )
    limit_bytes: int | None = Field(
        default=None,
        gt=0,
        description="Take the first modules, sorted by path, of together at most this many bytes of source. "
        "Unset: all.",
    )

    def parts(self, part_bytes: int, storage: StorageSettings = DEFAULT_STORAGE) -> list[Part]:
        """Groups of modules; for `docs`, the topics are a part before them."""
        parts = whole_files(self._modules(), part_bytes)
        return [Part((Span(_TOPICS, 0, 1),), 0), *parts] if self.part == "docs" else parts

    def records(self, part: Part, storage: StorageSettings) -> Iterator[Document | Rejected]:
        """Modules (url: stdlib:path), or topics and docstrings (url: stdlib:path:line)."""
        for span in part.spans:
            if span.path == _TOPICS:
                topics: dict[str, str] = import_module("pydoc_data.topics").topics
                for name in sorted(topics):
                    yield Document(topics[name], f"{_TOPICS}/{name}")
            else:
                yield from self._module(span.path)

    def stamp(self, storage: StorageSettings = DEFAULT_STORAGE) -> dict[str, Any]:
        """The interpreter's version, and the modules with their sizes."""
        return {"python": sys.version, **{path: f"{size} bytes" for path, size in self._modules()}}

    def _module(self, path: str) -> list[Document] | list[Rejected]:
        try:
            with tokenize.open(_library() / path) as handle:
                source = handle.read()
            return [Document(source, f"stdlib:{path}")] if self.part == "code" else list(_docstrings(source, path))
        except (SyntaxError, ValueError) as error:
            message = f"{_library() / path}: no Python source ({error}). Mend the Python installation."
            return [Rejected(f"stdlib:{path}", "no Python source", message)]

    def _modules(self) -> list[tuple[str, int]]:
        chosen, total = [], 0
        library = _library()
        for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).parts):
            relative = path.relative_to(library)
            if _LEFT_OUT.intersection(relative.parts):
                continue
            size = path.stat().st_size
            total += size
            if self.limit_bytes is not None and total > self.limit_bytes:
                break
            chosen.append((relative.as_posix(), size))
        if not chosen:
            raise UserError(
                f"the standard library in {library} has no module of at most {self.limit_bytes} bytes. "
                "Raise limit_bytes, or use a Python installed with its sources."
            )
        return chosen


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _docstrings(source: str, path: str) -> Iterator[Document]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None and len(text) > _SHORTEST_DOCSTRING:
                yield Document(text, f"stdlib:{path}:{getattr(node, 'lineno', 1)}")
