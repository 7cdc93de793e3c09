"""Where text comes from. A kind is one file: a settings class with its `parts` and `records`, listed in `AnySource`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .base import Document, Part, Rejected, Source, Span
from .hub import DatasetsSource
from .jsonl import JsonlSource
from .parquet import ParquetSource
from .stdlib import StdlibSource
from .text import TextSource
from .webdataset import WebDatasetSource

AnySource = Annotated[
    StdlibSource | TextSource | JsonlSource | ParquetSource | WebDatasetSource | DatasetsSource,
    Field(discriminator="kind"),
]

__all__ = [
    "AnySource",
    "DatasetsSource",
    "Document",
    "JsonlSource",
    "ParquetSource",
    "Part",
    "Rejected",
    "Source",
    "Span",
    "StdlibSource",
    "TextSource",
    "WebDatasetSource",
]
