"""What DeepSpeed writes goes through here: copied or written at once, flushed to the disk, failing only afterwards."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .host_copies import HostCopies

_base = importlib.import_module("deepspeed.runtime.checkpoint_engine.checkpoint_engine")


class CheckpointFiles(_base.CheckpointEngine):  # type: ignore[misc, name-defined]  # deepspeed has no types
    """DeepSpeed's checkpoint engine, which also flushes and keeps an error until all ranks are through.

    DeepSpeed's own lets an error of the disk out of the middle of ``save_checkpoint``, where the other ranks wait in a
    barrier for the rank that failed.

    Args:
        default: DeepSpeed's own, which reads.
        check: called with the path and the content of a file that is about to be written; may raise.
        device: where the tensors lie.
    """

    def __init__(self, default: Any, check: Callable[[str, Any], None], device: torch.device) -> None:
        super().__init__()
        self.name = "headrace"
        self.later = False
        """Only copy what is to be saved; it is written when :meth:`write` is called, in any thread."""
        self._default = default
        self._check = check
        self._copies = HostCopies(device)
        self._waiting: list[tuple[str, Any]] = []
        self._files: list[Path] = []
        self._error: OSError | None = None

    def create(self, info: Any) -> None:
        self._files, self._error = [], None
        self._waiting = []
        self._copies.restart()

    def save(self, state_dict: Any, path: str) -> None:
        optimizer = state_dict.get("optimizer_state_dict") or {}
        if "single_partition_of_fp32_groups" in optimizer:
            # DeepSpeed's bf16 optimizer of stage 1 leaves this out, without which DeepSpeed's own tool refuses the file
            optimizer.setdefault("zero_stage", 1)
        self._check(path, state_dict)
        if self.later:
            self._waiting.append((path, self._copies.copy(state_dict)))
        else:
            self._write(path, state_dict)

    def _write(self, path: str, content: Any) -> None:
        try:
            with open(path, "wb") as handle:
                torch.save(content, handle)
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

    def preserves_storage_sharing(self) -> bool:
        # else DeepSpeed saves copies of a model with expert groups, and what lies where could not be checked
        return False

    def commit(self, info: Any) -> bool:
        return True

    def write(self) -> list[Path]:
        """Write what still waits; the files of the last save. Raises the OSError that kept one from being written."""
        self._copies.wait()
        while self._waiting and self._error is None:
            self._write(*self._waiting.pop(0))
        if self._error is not None:
            raise self._error
        return self._files
