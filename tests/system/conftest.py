"""Tiny data sets, configurations and runs for tests that start the commands as a user would."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm_cluster import SlurmCluster, missing_programs, slurm_cluster

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


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A real Slurm of two nodes with two CPUs each, which starts in about a second."""
    if missing := missing_programs():
        pytest.skip(f"no Slurm here: {', '.join(missing)} missing (as root, `make slurm` installs it)")
    with slurm_cluster() as cluster:
        yield cluster
