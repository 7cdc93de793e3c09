"""Text to a data set folder, in two restartable passes."""

from __future__ import annotations

from .run import make_tokenizer, prepare
from .settings import PrepareSettings, TokenizerSettings, TokenizerTraining

__all__ = ["PrepareSettings", "TokenizerSettings", "TokenizerTraining", "make_tokenizer", "prepare"]
