"""Parameterizations of the linear layers. The reference is the same decoder in one process; what a layer computes is
held against independent code in the tests of each parameterization."""

from __future__ import annotations

from typing import Any

from . import Method


def linear(*rules: dict[str, Any]) -> Method:
    return Method({"model": {"linear": list(rules)}})


METHODS = {
    "dense": linear(),
    "low_rank": linear({"kind": "low_rank", "rank": 6}),
    "cola": linear({"kind": "cola", "rank": 6}),
    "lost": linear({"kind": "lost", "rank": 6, "column_fraction": 0.1}),
    "lost without a sparse part": linear({"kind": "lost", "rank": 6, "gamma": 1.0, "activation": "identity"}),
    "column_sparse": linear({"kind": "column_sparse", "column_fraction": 0.5}),
    "several": linear(
        {"kind": "lost", "rank": 6, "columns": "random", "modules": ["attention.*"]},
        {"kind": "cola", "rank": 8, "modules": ["feed_forward.*"], "layers": "1"},
    ),
}
