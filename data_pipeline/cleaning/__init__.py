"""Cleaning of text while it is prepared: normalisation, quality rules, decontamination, duplicates."""

from __future__ import annotations

from .cleaner import Cleaner, Rejection
from .settings import CleaningSettings

__all__ = ["Cleaner", "CleaningSettings", "Rejection"]
