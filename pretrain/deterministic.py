"""The same bits from the same inputs, also on a GPU: what torch and its libraries have to be told before any work."""

from __future__ import annotations

import os

import torch

from data_pipeline.errors import UserError

CUBLAS = (":4096:8", ":16:8")
"""Workspaces with which cuBLAS 10.2 and later is deterministic (NVIDIA, cuBLAS documentation, section 2.1.4)."""


def be_deterministic() -> None:
    """Take deterministic kernels everywhere in this process. Before the first use of a GPU.

    An operation that has none is an error of torch then, which names it. ``NCCL_ALGO`` leaves out NVLS, whose sums are
    made in switches, unless the environment sets it.

    Raises:
        UserError: the environment sets a workspace of cuBLAS that is not deterministic.
    """
    found = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS[0])
    if found not in CUBLAS:
        raise UserError(
            f"stability.deterministic: CUBLAS_WORKSPACE_CONFIG = {found!r} in the environment lets cuBLAS give other "
            f"bits each time. Unset it, or set it to {' or '.join(CUBLAS)}."
        )
    os.environ.setdefault("NCCL_ALGO", "^NVLS")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # not in its stubs
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
