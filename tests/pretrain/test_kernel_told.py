"""What makes the batches is told at the start of a run, and each host where it is the slow way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from pretrain.run import Session

NATIVE, NUMPY = "the native kernel (CRC32C by the CPU, AVX2 vectors)", "NumPy, for HEADRACE_KERNEL=numpy"


@dataclass
class Ranks:
    """Ranks that say something already."""

    rank: int
    said: list[tuple[str, str]]

    def gather_objects(self, _: Any) -> list[tuple[str, str]]:
        return self.said


@pytest.mark.parametrize("rank", [0, 1])
def test_each_slow_host_is_named_once(rank: int, capsys: pytest.CaptureFixture[str]) -> None:
    ranks: Any = Ranks(rank, [("n1", NATIVE), ("n2", NUMPY), ("n2", NUMPY), ("n3", NATIVE)])
    Session(ranks)._tell_kernel()
    out, err = capsys.readouterr()
    told = (f"batches are made by {NATIVE}\n", f"warning: n2 makes batches more slowly than it could: by {NUMPY}\n")
    assert (out, err) == (told if rank == 0 else ("", ""))
