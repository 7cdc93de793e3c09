"""The two kernels, for tests that hold with either."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from data_pipeline import kernel

KINDS = ("native", "numpy")


def using(kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is opened meanwhile makes its batches so; skips where there is no compiler."""
    monkeypatch.setenv(kernel.SWITCH, "numpy" if kind == "numpy" else "auto")
    kernel._find.cache_clear()
    if kind == "native" and not isinstance(kernel.load(), kernel.NativeKernel):
        pytest.skip(kernel.describe())
    yield
    monkeypatch.undo()
    kernel._find.cache_clear()
