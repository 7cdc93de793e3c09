"""What DeepSpeed writes goes through here: flushed to the disk, remembered, and failing only afterwards."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_base = importlib.import_module("deepspeed.runtime.checkpoint_engine.checkpoint_engine")


class CheckpointFiles(_base.CheckpointEngine):  # type: ignore[misc, name-defined]  # deepspeed has no types
    """DeepSpeed's checkpoint engine, which also flushes and keeps an error until all ranks are through.

    DeepSpeed's own lets an error of the disk out of the middle of ``save_checkpoint``, where the other ranks wait in a
    barrier for the rank that failed.

    Args:
        default: DeepSpeed's own, which reads.
        check: called with the path and the content of a file that is about to be written; may raise.
    """

    def __init__(self, default: Any, check: Callable[[str, Any], None]) -> None:
        super().__init__()
        self.name = "headrace"
        self._default = default
        self._check = check
        self._files: list[Path] = []
        self._error: OSError | None = None

    def create(self, info: Any) -> None:
        self._files, self._error = [], None

    def save(self, state_dict: Any, path: str) -> None:
        optimizer = state_dict.get("optimizer_state_dict") or {}
        if "single_partition_of_fp32_groups" in optimizer:
            # DeepSpeed's bf16 optimizer of stage 1 leaves this out, without which DeepSpeed's own tool refuses the file
            optimizer.setdefault("zero_stage", 1)
        self._check(path, state_dict)
        try:
            with open(path, "wb") as handle:
                torch.save(state_dict, handle)
                handle.flush()
                os.fsync(handle.fileno())
            self._files.append(Path(path))
        except OSError as error:
            self._error = self._error or error
        except RuntimeError as error:
            # torch's zip writer turns a full disk into a RuntimeError while it closes the file it could not write
            cause = error.__context__
            self._error = self._error or (cause if isinstance(cause, OSError) else OSError(str(error)))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self._error = self._error or error

    def load(self, path: str, map_location: Any = None) -> Any:
        return self._default.load(path, map_location)

    def commit(self, info: Any) -> bool:
        return True

    def written(self) -> list[Path]:
        """The files of the last save. Raises the OSError that kept one of them from being written."""
        if self._error is not None:
            raise self._error
        return self._files
