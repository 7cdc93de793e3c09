"""The tiny data set and runs of the system tests."""

from __future__ import annotations

from tests.system.conftest import runs, tiny_data

__all__ = ["runs", "tiny_data"]
