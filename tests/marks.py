"""Marks of parameters."""

from typing import Any

import pytest


def campaign(*values: Any) -> Any:
    """Parameters that only ``pytest -m campaign`` runs: others in the default run show the same code at work."""
    return pytest.param(*values, marks=pytest.mark.campaign)
