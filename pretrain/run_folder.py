"""The run folder: made, checked for writing, and given the resolved configuration."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import time
import uuid
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.damage import DAMAGE_FOLDER
from data_pipeline.errors import UserError
from data_pipeline.files import publish_bytes
from data_pipeline.history import HISTORY_FILE

from .config import Config
from .stability.rollbacks import ROLLBACKS_FILE

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"
HANGS = "hangs"
"""Folder of what ranks leave when a step does not end, a folder for each attempt."""
COMMIT_FILE = "COMMIT"
"""Beside the packages of a copy that is no git checkout: the commit that it was copied from."""
LOCK_FILE = ".lock"
LOCK_PATIENCE_SECONDS = 120
"""Longer than the lease of an NFSv4 server, 90 s by default."""


def open_run_folder(config: Config) -> Path:
    """Make the run folder and see that files can be written there. Raises UserError when not."""
    folder = config.run_folder
    probe = folder / f".probe.{uuid.uuid4().hex}"  # ranks on several hosts may have the same process id
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"the run folder {folder} can't be written: {error.strerror}. Choose another run.folder or run.name, or "
            "mend its permissions."
        ) from error
    return folder


def lock_run_folder(folder: Path) -> int:
    """Take the run folder for this process, until it ends however it ends; returns the lock's descriptor.

    A file system without locks is told and used without one.

    Raises:
        UserError: another process trains here; two would write into each other's checkpoints.
    """
    try:
        lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{folder / LOCK_FILE} can't be written: {error.strerror}. Mend its permissions.") from error
    try:
        _flock_patiently(lock)
    except BlockingIOError as error:
        holder = os.read(lock, 1000).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise UserError(
            f"the run folder {folder} is in use by another run ({holder}). Wait for it or stop it, or choose another "
            "run.name."
        ) from error
    except OSError as error:
        print(f"warning: {folder} lies on a file system without locks ({error.strerror})", file=sys.stderr)
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return lock


def _flock_patiently(lock: int) -> None:
    """Lock, waiting for a holder on another host: a network file system keeps a dead node's locks for a while."""
    deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            elsewhere = f" on {socket.gethostname()}\n".encode() not in os.pread(lock, 1000, 0)
            if not elsewhere or time.monotonic() > deadline:
                raise
            time.sleep(1.0)


def write_config(folder: Path, config: Config, identity: dict[str, Any]) -> None:
    """Publish ``config.yaml``: the resolved configuration, headed by the fingerprints of data and code."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    header = f"# data {digest}\n# code {json.dumps(versions())}\n"
    publish_bytes(folder / CONFIG_FILE, (header + yaml.safe_dump(plain(config), sort_keys=False)).encode())


def plain(config: Config) -> dict[str, Any]:
    """The configuration as JSON has it: lists for tuples, every default spelled out."""
    content: dict[str, Any] = json.loads(config.model_dump_json())
    return content


def set_aside(folder: Path, attempt: int) -> Path | None:
    """``resume=never``: move what earlier attempts left into ``before_attempt_N``; None when there was nothing."""
    names = (CHECKPOINTS, DAMAGE_FOLDER, HISTORY_FILE, ROLLBACKS_FILE, "metrics.jsonl", "tensorboard")
    present = [folder / name for name in names if (folder / name).exists()]
    if not present:
        return None
    targets = (f"before_attempt_{attempt}{suffix}" for suffix in ("", *(f"_{number}" for number in range(2, 1000))))
    target = next(folder / name for name in targets if not (folder / name).exists())
    try:
        target.mkdir()
        for path in present:
            os.rename(path, target / path.name)
    except OSError as error:
        raise UserError(
            f"{folder}: what it holds can't be set aside ({error}). Mend that, or take a new run.name."
        ) from error
    return target


@cache
def versions() -> dict[str, str]:
    """Versions that decide what a run computes, and the commit of the code where it is a git checkout or a copy of one
    (:data:`COMMIT_FILE`)."""
    found = {"python": platform.python_version()}
    for package in ("headrace", "torch", "deepspeed"):
        found[package] = importlib.metadata.version(package)
    copied = Path(__file__).parents[1] / COMMIT_FILE
    if copied.is_file():  # a copy below a checkout must not take that one's commit for its own
        return {**found, "commit": copied.read_text().strip()}
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        described = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return found
    if described.returncode == 0:
        found["commit"] = described.stdout.strip()
    return found
