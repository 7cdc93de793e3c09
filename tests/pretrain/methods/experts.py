"""Mixtures of experts. The reference is the same decoder on one process; what its layers compute is held against
independent code in tests/pretrain/test_experts.py."""

from __future__ import annotations

from typing import Any

from . import Method
from .optimizers import muon

EXPERTS = {"number": 4, "top_k": 2, "intermediate_size": 12}


def experts(settings: dict[str, Any], **sections: dict[str, Any]) -> Method:
    return Method({"model": {"experts": {**EXPERTS, **settings}}, **sections})


METHODS = {
    "dropless": experts({"shared": 1}),
    "all that changes the choice": experts(
        {
            "score": "sigmoid",
            "scaling": 1.5,
            "jitter": 0.1,
            "groups": {"number": 2, "kept": 1},
            "capacity": {"factor": 0.9},
            "dense_first": 1,
        }
    ),
    "expert choice": experts({"routing": "expert_choice", "normalised": False}),
    "hybrid": experts({"routing": {"kind": "hybrid", "threshold": 0.5, "top_p": 0.7}, "entropy": {}}),
    "muon": Method(
        {**muon().sections, "model": {"experts": EXPERTS}}, optimizer=muon().optimizer, tolerances=muon().tolerances
    ),
}
