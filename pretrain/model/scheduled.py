"""Buffers that change at some optimizer steps: one protocol, and one walk that the engine makes before each step.

What a schedule decides must follow from the step, the parameters and the buffers alone: a resumed run, which has all
three from its checkpoint, then decides the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

ReadParameter = Callable[[str], Tensor]
"""A parameter by its full name: whole, fp32, the optimizer's own copy. All ranks ask for the same ones in one order."""


class Schedule(Protocol):
    """Changes the buffers of the modules that share it. All ranks do the same and get the same values."""

    def due(self, step: int) -> bool:
        """Whether something changes before optimizer step ``step`` (from 0)."""

    def update(self, step: int, modules: Mapping[str, Any], read: ReadParameter) -> None:
        """Change the buffers of ``modules`` (by full name), in place."""


@runtime_checkable
class Scheduled(Protocol):
    """A module with buffers that a schedule changes."""

    schedule: Schedule | None
    """The same object in all modules that are decided on together; None: nothing ever changes."""


class Together(NamedTuple):
    """A schedule and the modules that share it."""

    schedule: Schedule
    modules: Mapping[str, nn.Module]


def schedules(model: nn.Module) -> list[Together]:
    """The schedules of a model, each with its modules in the model's order."""
    found: dict[int, tuple[Schedule, dict[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        schedule = module.schedule if isinstance(module, Scheduled) else None
        if schedule is not None:
            found.setdefault(id(schedule), (schedule, {}))[1][name] = module
    return [Together(*each) for each in found.values()]
