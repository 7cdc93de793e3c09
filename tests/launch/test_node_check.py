"""Nodes are compared by what their ranks wrote down; a whole check on a real Slurm is in tests/system."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.node_check import check_device, check_files, check_memory, check_network
from launch.node_verdict import STAGES, read_checks
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")
GOOD = {"tflops": 100.0, "free_gb": 70.0, "file_mb_per_s": 900.0, "link_mb_per_s": 9000.0}


def write(logs: Path, rank: int, per_node: int = 2, **changes: Any) -> None:
    report = {"rank": rank, "ranks_per_node": per_node, "done": list(STAGES), "errors": {}, "measured": GOOD, **changes}
    (logs / f"rank_{rank:05d}.json").write_text(json.dumps(report))


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """Three nodes of two ranks, all well."""
    for rank in range(6):
        write(tmp_path, rank)
    return tmp_path


NAMES = ("a1", "a2", "b7")


def test_good_nodes(logs: Path) -> None:
    found = read_checks(logs, NAMES)
    assert found.fit
    assert (found.broken, found.slow, found.unknown) == ({}, {}, "")
    assert found.summary.startswith(
        "3 nodes: 100 to 100 TFLOP/s, 900 to 900 MB/s of files, 9e+03 to 9e+03 MB/s between"
    )


def test_a_broken_device_is_told_and_what_it_breaks_is_not(logs: Path) -> None:
    write(logs, 3, errors={"device": "RuntimeError: other bits", "network": "RuntimeError: connection closed"})
    write(logs, 0, errors={"network": "RuntimeError: connection closed by peer"})
    found = read_checks(logs, NAMES)
    assert found.broken == {"a2": "rank 3: device: RuntimeError: other bits"}
    assert found.unknown == ""


def test_a_node_that_says_nothing_and_one_that_hangs(logs: Path) -> None:
    for rank in (0, 1):
        (logs / f"rank_{rank:05d}.json").unlink()
    write(logs, 5, done=["device"], errors={})
    for rank in (2, 3, 4):
        write(logs, rank, done=list(STAGES[:-1]))  # they waited for the others
    found = read_checks(logs, NAMES)
    assert found.broken == {
        "a1": "rank 0 said nothing within 60 s; rank 1 said nothing within 60 s",
        "b7": "rank 5: did not end the check of its memory within 60 s",
    }


def test_a_network_that_fails_blames_no_node(logs: Path) -> None:
    write(logs, 4, errors={"network": "RuntimeError: Connection reset by peer"})
    write(logs, 2, done=list(STAGES[:-1]))
    found = read_checks(logs, NAMES)
    assert not found.fit
    assert found.broken == {}
    assert found.unknown == "rank 2: it did not end within 60 s; rank 4: RuntimeError: Connection reset by peer"


def test_a_slow_node_is_named_and_goes_on(logs: Path) -> None:
    write(logs, 1, measured={**GOOD, "tflops": 69.0})  # a node is as fast as its slowest rank
    write(logs, 4, measured={**GOOD, "link_mb_per_s": 2600.0, "file_mb_per_s": 181.0})
    found = read_checks(logs, NAMES)
    assert found.fit
    assert found.slow == {
        "a1": "69 TFLOP/s, the median node has 100",
        "b7": "2.6e+03 MB/s between nodes, the median node has 9e+03",
    }


def test_what_a_rank_measures(tmp_path: Path) -> None:
    assert check_device(CPU)["tflops"] > 0
    assert check_memory(CPU)["free_gb"] > 0
    assert check_files(tmp_path)["file_mb_per_s"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_computes_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "equal", lambda one, other: False)
    with pytest.raises(RuntimeError, match="with other bits"):
        check_device(CPU)


def test_a_file_system_that_gives_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"other")
    with pytest.raises(RuntimeError, match="came back changed"):
        check_files(tmp_path)


def links(nodes: int) -> dict[str, float]:
    from pretrain.distributed import start

    ranks = start(60)
    return check_network(ranks, ranks.rank, nodes, 1)


@pytest.mark.parametrize("nodes", [2, 3])
def test_every_node_has_a_link(nodes: int) -> None:
    assert all(found["link_mb_per_s"] > 0 for found in run_on_ranks(links, nodes, nodes))
