"""Text to a data set folder, in two restartable passes."""

from __future__ import annotations

from .claims import Share
from .run import make_tokenizer, merge, prepare, prepare_share
from .settings import PrepareSettings, TokenizerSettings, TokenizerTraining

__all__ = [
    "PrepareSettings",
    "Share",
    "TokenizerSettings",
    "TokenizerTraining",
    "make_tokenizer",
    "merge",
    "prepare",
    "prepare_share",
]
