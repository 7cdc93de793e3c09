"""Preflight of the disk: may the run folder be written, and does it hold the checkpoints that are to be kept."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pretrain.checkpoint import complete_checkpoints, read_manifest, step_of
from pretrain.config import Config
from pretrain.costs import has_masters, memory
from pretrain.model import count_parameters
from pretrain.run_folder import CHECKPOINTS

from .findings import Finding, Request, existing, size


def check_disk(config: Config, vocab_size: int, request: Request) -> Iterator[Finding]:
    """Room for the checkpoints to be kept, and one more that is being written."""
    folder = existing(config.run_folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        mend = "Mend its permissions, or choose another run.folder."
        yield Finding("disk.permission", "error", f"{folder} can't be written, so {config.run_folder} can't be.", mend)
        return
    bytes_each, files_each, origin = _checkpoint(config, vocab_size, request)
    there = len(complete_checkpoints(config.run_folder / CHECKPOINTS))
    missing = max(0, _kept(config) - there) + 1
    need, free = missing * bytes_each, shutil.disk_usage(folder).free
    told = f"{missing} further checkpoints of {size(bytes_each)} ({origin}) take {size(need)}"
    mend = "Free some, choose another run.folder, or lower checkpoint.keep_last or keep fewer for good (keep_every)."
    if need > free:
        yield Finding("disk.space", "error", f"{told}, and {folder} has {size(free)} left.", mend)
    elif need > 0.8 * free:
        yield Finding("disk.tight", "warning", f"{told}; {folder} has {size(free)} left.", mend)
    else:
        yield Finding("disk", "info", f"{told}; {folder} has {size(free)} left.")
    system = os.statvfs(folder)
    wanted = missing * files_each + 100 * request.worlds[-1]  # logs and metrics besides
    if system.f_files and wanted > system.f_favail:
        cause = f"The run makes about {wanted:,} files, and {folder} has room for {system.f_favail:,} (inodes)."
        yield Finding("disk.inodes", "error", cause, "Remove files there, or choose another run.folder.")


def _kept(config: Config) -> int:
    """Checkpoints that the finished run will have."""
    settings = config.checkpoint
    for_good = config.total_steps // settings.keep_every if settings.keep_every else 0
    made = math.ceil(config.total_steps / settings.every_steps) if settings.every_steps else 1
    return min(made, settings.keep_last + for_good)


def _checkpoint(config: Config, vocab_size: int, request: Request) -> tuple[float, int, str]:
    """Bytes and files of one checkpoint, and how they are known."""
    newest: Path | None = max(complete_checkpoints(config.run_folder / CHECKPOINTS), key=step_of, default=None)
    if newest and (files := read_manifest(newest)):
        return float(sum(file.bytes for file in files)), len(files) + 1, f"as {newest.name}"
    count = count_parameters(config.model, vocab_size).total
    ranks = request.worlds[-1]
    state = memory(config, vocab_size, ranks)["optimizer_state"]
    # the weights stand beside the optimizer's copy; ZeRO 3 saves them by rank with it
    weights = 0 if config.engine.zero_stage == 3 and has_masters(config) else count
    value = 2 if config.training.precision == "bf16" else 4
    return float(state + weights * value), 3 * ranks + 5, "estimated"
