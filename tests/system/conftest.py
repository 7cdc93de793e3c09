"""Tiny data sets, configurations and runs for tests that start the commands as a user would."""

from __future__ import annotations

from pathlib import Path

import pytest

from .runs import Runs, write_tiny_data


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with the domains ``a`` and ``b``, each of some hundred short documents of random tokens."""
    folder = tmp_path_factory.mktemp("tiny") / "data"
    write_tiny_data(folder)
    return folder


@pytest.fixture
def runs(tmp_path: Path, tiny_data: Path) -> Runs:
    """Starts runs of a tiny model below ``tmp_path``."""
    return Runs(tmp_path, tiny_data)
