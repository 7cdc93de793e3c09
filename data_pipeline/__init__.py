"""Text -> shards -> batches: the public face of the package.

Names are imported when they are first used, so that a command that only needs the errors, the settings or a manifest
does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch_plan import BatchPlan as BatchPlan
    from .batches import Batch as Batch
    from .errors import DataError as DataError
    from .errors import HeadraceError as HeadraceError
    from .errors import UserError as UserError
    from .loader import EvaluationLoader as EvaluationLoader
    from .loader import StepLoader as StepLoader
    from .manifest import Manifest as Manifest
    from .manifest import read_manifest as read_manifest
    from .mixture import Phase as Phase
    from .order import Order as Order
    from .order import OrderSource as OrderSource
    from .order import difference as difference
    from .reader import TokenSource as TokenSource
    from .step_reader import Step as Step
    from .tokenizer import Tokenizer as Tokenizer

_HOMES = {
    "Batch": "batches",
    "BatchPlan": "batch_plan",
    "DataError": "errors",
    "EvaluationLoader": "loader",
    "HeadraceError": "errors",
    "Manifest": "manifest",
    "Order": "order",
    "OrderSource": "order",
    "Phase": "mixture",
    "Step": "step_reader",
    "StepLoader": "loader",
    "TokenSource": "reader",
    "Tokenizer": "tokenizer",
    "UserError": "errors",
    "difference": "order",
    "read_manifest": "manifest",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
