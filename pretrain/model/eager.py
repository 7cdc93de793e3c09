"""What a compiled block calls as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch._compile import _disable_dynamo

P = ParamSpec("P")
R = TypeVar("R")


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """As ``torch.compiler.disable``, which loads the compiler at once: a second of CPU time in every process that only
    plans, checks or looks. This is what PyTorch's own optimizers are decorated with, and loads it at the first call."""
    return _disable_dynamo(function)
