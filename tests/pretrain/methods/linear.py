"""Parameterizations of the linear layers. The reference is the same decoder in one process; what a layer computes is
held against independent code in the tests of each parameterization."""

from __future__ import annotations

from typing import Any

from . import Method


def linear(*rules: dict[str, Any]) -> Method:
    return Method({"model": {"linear": rules}})


METHODS = {"dense": linear()}
