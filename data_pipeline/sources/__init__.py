"""Where text comes from. A kind is one file: a settings class with its `parts` and `read`, listed in `AnySource`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .base import Document, Part, Source, Span
from .hub import DatasetsSource
from .jsonl import JsonlSource
from .parquet import ParquetSource
from .stdlib import StdlibSource
from .text import TextSource

AnySource = Annotated[
    StdlibSource | TextSource | JsonlSource | ParquetSource | DatasetsSource, Field(discriminator="kind")
]

__all__ = [
    "AnySource",
    "DatasetsSource",
    "Document",
    "JsonlSource",
    "ParquetSource",
    "Part",
    "Source",
    "Span",
    "StdlibSource",
    "TextSource",
]
