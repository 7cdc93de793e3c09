"""The folders of checkpoints: which are complete, what they say, how one is removed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from pretrain.engine import read_layout
from pretrain.engine.layout import Layout

from .manifest import NAME, FileRecord, intact, problems, read_manifest

SAVING = ".saving_"
DELETING = ".deleting_"


def checkpoint_name(step: int) -> str:
    return f"step_{step:09d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def step_folders(folder: Path) -> list[Path]:
    """Whatever has the name of a checkpoint below ``folder``, by rising step."""
    return sorted(folder.glob("step_" + "[0-9]" * 9))


def complete_checkpoints(folder: Path) -> list[Path]:
    """The folders below ``folder`` that hold a manifest and every file in its size, by rising step. Not collective."""
    complete = []
    for path in step_folders(folder):
        files = read_manifest(path)
        if files is not None and not problems(path, files, hashes=False):
            complete.append(path)
    return complete


def intact_layout(path: Path) -> tuple[list[FileRecord], Layout]:
    """The files of a checkpoint of which every byte is as it was saved, and what lies where in them.

    Raises:
        UserError: ``path`` is no complete checkpoint.
        DataError: it is damaged, or its record does not account for every element of every parameter.
    """
    files, layout = intact(path), read_layout(path)
    known = {file.path for file in files}
    if missing := sorted({layout.model, *(place.file for place in layout.places)} - known):
        raise DataError(f"{path}: layout.json names files that were not saved: {', '.join(missing[:4])}")
    return files, layout


def read_state(path: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint. Raises DataError when it can't be read."""
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path / 'state.json'} can't be read: {error}. Is {path} a checkpoint of Headrace?") from error
    return state


def remove(path: Path) -> None:
    """Invisible first, gone afterwards: a removal that is killed leaves no half checkpoint that looks whole."""
    (path / NAME).unlink(missing_ok=True)
    doomed = path.with_name(DELETING + path.name)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def reason(error: OSError) -> str:
    return f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
