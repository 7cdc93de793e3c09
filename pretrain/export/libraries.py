"""The libraries of the Hugging Face world, which only export and import need."""

from __future__ import annotations

import importlib
from typing import Any

from data_pipeline.errors import UserError


def needed(module: str) -> Any:
    """Import ``module``. Raises UserError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{module} is not installed ({error}): pip install 'headrace[hf]'") from error
