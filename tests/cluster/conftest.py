"""A real Slurm, and the tiny runs of the system tests as its jobs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.conftest import runs, tiny_data

from .slurm_cluster import SlurmCluster, missing_programs, slurm_cluster

__all__ = ["runs", "slurm", "tiny_data"]


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A real Slurm of two nodes with two CPUs each, which starts in about a second.

    Jobs of the partition ``urgent`` take nodes away from those of ``main``, which have 30 s to save.
    """
    if missing := missing_programs():
        pytest.skip(f"no Slurm here: {', '.join(missing)} missing (as root, `make slurm` installs it)")
    partitions = (
        "PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30",
        "PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF",
    )
    preemption = "PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE"
    with slurm_cluster(partitions=partitions, extra=preemption) as cluster:
        yield cluster
