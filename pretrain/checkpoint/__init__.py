"""Checkpoints: saved completely or not at all, found again, verified."""

from .folders import complete_checkpoints, intact_layout, read_state, step_of
from .manifest import intact, read_manifest
from .random_state import seed_generators
from .store import CheckpointError, CheckpointStore

__all__ = [
    "CheckpointError",
    "CheckpointStore",
    "complete_checkpoints",
    "intact",
    "intact_layout",
    "read_manifest",
    "read_state",
    "seed_generators",
    "step_of",
]
