"""Which rank's failure a launched run's error names."""

from __future__ import annotations

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from launch.agent import first_failure


def failure(rank: int, code: int, timestamp: int) -> ProcessFailure:
    made = ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=code, error_file="<none>")
    made.timestamp = timestamp
    return made


@pytest.mark.parametrize(
    ("found", "first"),
    [
        # (rank, exit code, second at which it failed or was found dead)
        ([(0, 1, 50), (1, 2, 49)], 1),
        ([(0, 1, 50), (1, -9, 50)], 1),  # found in one look: 0 lost its connection to 1
        ([(0, 1, 49), (1, -9, 50)], 1),
        ([(0, -15, 50), (1, 2, 50)], 1),  # the agent ends the others
        ([(0, -9, 80), (1, 2, 50), (2, -15, 50)], 1),  # and those that hang, later
        ([(0, -15, 50), (1, -6, 50)], 1),
    ],
)
def test_thefirst_failure(found: list[tuple[int, int, int]], first: int) -> None:
    failures = {rank: failure(rank, code, timestamp) for rank, code, timestamp in found}
    assert first_failure(failures) == (first, failures[first])
