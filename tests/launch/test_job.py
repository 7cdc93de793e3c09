"""What a job's start works out on its first node."""

from __future__ import annotations

import socket

import pytest

from launch.job import FIRST_PORT, PORTS, fitting_nodes, free_port
from pretrain.config import load_config
from tests.system.runs import Runs


def test_as_many_nodes_as_divide_the_batch(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(runs.config("run"))  # 8 sequences in micro-batches of 2: on 1, 2 or 4 ranks
    monkeypatch.setenv("HEADRACE_RANKS_PER_NODE", "1")
    assert [fitting_nodes(config, nodes) for nodes in (5, 4, 3, 2, 1)] == [4, 4, 2, 2, 1]
    monkeypatch.setenv("HEADRACE_RANKS_PER_NODE", "2")
    assert [fitting_nodes(config, nodes) for nodes in (4, 3, 1)] == [2, 2, 1]
    monkeypatch.setenv("HEADRACE_RANKS_PER_NODE", "3")
    assert fitting_nodes(config, 4) == 0


def test_a_port_is_free_and_no_other_of_the_job() -> None:
    job = 1_234_567
    port = free_port(job)
    assert FIRST_PORT <= port < FIRST_PORT + PORTS
    assert free_port(job) == port, "the same for the same job"
    assert free_port(job, port) != port
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        assert free_port(job) != port
