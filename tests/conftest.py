"""What holds for all tests."""

from __future__ import annotations

import os
import shutil
import tempfile


def pytest_configure() -> None:
    """transformers copies the code of exported models here: not home, and not where another process does the same."""
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="transformers-modules-")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)
