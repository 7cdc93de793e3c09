"""Checkpoints: saved completely or not at all, found again, verified."""

from .folders import complete_checkpoints, intact_layout, read_state, step_of
from .manifest import intact, read_manifest
from .random_state import seed_generators
from .second import intact_elsewhere, refuse_copies
from .store import CheckpointError, CheckpointStore, Saved

__all__ = [
    "CheckpointError",
    "CheckpointStore",
    "Saved",
    "complete_checkpoints",
    "intact",
    "intact_elsewhere",
    "intact_layout",
    "read_manifest",
    "read_state",
    "refuse_copies",
    "seed_generators",
    "step_of",
]
