"""Checkpoints of a run: complete or invisible, found by looking at them, kept by rule (laws 4 and 5).

::

    checkpoints/step_000000500/
        MANIFEST.json     written last: every file with size and hash
        state.json        step, position, tokens, what the data, model and topology were
        layout.json       where every element of weights and optimizer state lies, by name (pretrain.engine.layout)
        rank_00000.pt     random states of each rank
        deepspeed/        what DeepSpeed saves, readable by its own tools

A checkpoint is written in ``.saving_step_...``, flushed, given its manifest and renamed. Nothing points to the newest
one: it is the complete folder with the highest step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import DataError, HeadraceError, UserError
from data_pipeline.files import fsync_folder, publish, publish_json
from pretrain.config import CheckpointSettings
from pretrain.distributed import Distributed
from pretrain.engine import Engine, read_layout
from pretrain.engine.layout import Layout

from .manifest import NAME, FileRecord, intact, problems, read_manifest, record_file, write_manifest
from .random_state import random_states, restore_random_states

_SAVING = ".saving_"
_DELETING = ".deleting_"


class CheckpointError(HeadraceError):
    """A checkpoint could not be written; the ones before it are untouched."""


class CheckpointStore:
    """The checkpoints below one folder. All methods but the constructor are collective.

    Args:
        folder: the run's ``checkpoints`` folder; made if missing.
        settings: what to keep.
        ranks: this process among its peers.
    """

    def __init__(self, folder: Path, settings: CheckpointSettings, ranks: Distributed) -> None:
        self._folder = folder
        self._settings = settings
        self._ranks = ranks
        if ranks.rank == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for leftover in [*folder.glob(f"{_SAVING}*"), *folder.glob(f"{_DELETING}*")]:
                    shutil.rmtree(leftover)
            except OSError as error:
                raise UserError(
                    f"{folder} can't be written or cleared of an unfinished save: {_reason(error)}. Mend that."
                ) from error

    def save(self, engine: Engine, state: Mapping[str, Any]) -> Path:
        """Write and publish the checkpoint of ``state["step"]``, then remove what the rules no longer keep.

        Raises:
            CheckpointError: on every rank, when any of them could not write.
        """
        name = checkpoint_name(state["step"])
        draft, final = self._folder / f"{_SAVING}{name}", self._folder / name
        failure: str | None = None
        failed = f"checkpoint {name} could not be saved"
        files: list[FileRecord] = []
        try:
            if self._ranks.rank == 0:
                draft.mkdir()
        except OSError as error:
            failure = _reason(error)
        self._agree(failure, failed, draft)
        try:
            written = engine.save(draft)
            written += self._write_own(draft, state)
            files = [record_file(draft, path) for path in written]
        except OSError as error:
            failure = _reason(error)
        self._agree(failure, failed, draft)
        everything = [file for part in self._ranks.gather_objects(files) for file in part]
        if self._ranks.rank == 0:
            try:
                self._publish(draft, final, everything)
                failed = "a checkpoint that is no longer kept could not be removed"
                self._remove_old(final)
            except OSError as error:
                failure = _reason(error)
        self._agree(failure, self._ranks.broadcast_object(failed), draft)
        return final

    def _write_own(self, draft: Path, state: Mapping[str, Any]) -> list[Path]:
        own = draft / f"rank_{self._ranks.rank:05d}.pt"
        with publish(own) as handle:
            torch.save(random_states(), handle)
        if self._ranks.rank:
            return [own]
        publish_json(draft / "state.json", dict(state))
        return [own, draft / "state.json"]

    def _agree(self, failure: str | None, what: str, draft: Path) -> None:
        """Raise on all ranks when one of them failed, so that none waits for it in the next collective."""
        failures = self._ranks.gather_objects(failure)
        if not any(failures):
            return
        if self._ranks.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
        reasons = "; ".join(f"rank {rank}: {reason}" for rank, reason in enumerate(failures) if reason)
        kept = [path.name for path in complete_checkpoints(self._folder)]
        raise CheckpointError(
            f"{what} below {self._folder}: {reasons}. "
            f"{'The complete checkpoint ' + kept[-1] + ' is untouched' if kept else 'There is no earlier checkpoint'}; "
            "mend the disk, then start the same command again."
        )

    def _publish(self, draft: Path, final: Path, files: list[FileRecord]) -> None:
        for folder in {(draft / file.path).parent for file in files}:
            fsync_folder(folder)
        write_manifest(draft, files)
        if final.exists():
            # only a broken folder can stand there: a run never saves a step that it could have resumed from
            _remove(final)
        os.rename(draft, final)
        fsync_folder(self._folder)

    def _remove_old(self, newest: Path) -> None:
        complete = complete_checkpoints(self._folder)
        keep = set(complete[-self._settings.keep_last :]) | {newest}
        if self._settings.keep_every:
            keep |= {path for path in complete if step_of(path) % self._settings.keep_every == 0}
        for path in complete:
            if path not in keep:
                _remove(path)

    def find(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint whose every byte is as it was saved, and what was wrong with newer ones.

        A folder with a manifest was complete once: whatever it lacks now is damage, which is told. One without was
        never finished, or its removal was interrupted. The hashes are checked by all ranks together, each a share of
        the files.

        Raises:
            DataError: there are checkpoints but every one of them is damaged.
        """
        found: list[str] = []
        damaged: list[Path] = []
        candidates = self._ranks.broadcast_object([path for path in _folders(self._folder) if (path / NAME).exists()])
        for path in reversed(candidates):
            damage = self.damage(path)
            if not damage:
                self._set_aside(damaged)
                return path, found
            found += damage
            damaged.append(path)
        if candidates:
            raise DataError(
                f"every checkpoint below {self._folder} is damaged: {'; '.join(found)}. Restore one of them from a "
                "copy, or start over with resume=never."
            )
        return None, found

    def _set_aside(self, damaged: list[Path]) -> None:
        """Rename damaged checkpoints, so that no clean-up counts one as kept."""
        if self._ranks.rank == 0:
            for path in damaged:
                count = len(list(self._folder.glob(f"damaged_{path.name}*")))
                os.rename(path, path.with_name(f"damaged_{path.name}{f'_{count + 1}' if count else ''}"))
        self._ranks.barrier()

    def damage(self, path: Path) -> list[str]:
        """What is wrong with a checkpoint, the same on every rank; each reads a share of the files."""
        files = self._ranks.broadcast_object(read_manifest(path))
        if files is None:
            return [f"{path / NAME} can't be read as it was saved"]
        share = files[self._ranks.rank :: self._ranks.world_size]
        return [problem for part in self._ranks.gather_objects(problems(path, share, hashes=True)) for problem in part]

    def load(self, path: Path, engine: Engine) -> None:
        """Restore the engine and this rank's random states from a checkpoint of any topology."""
        engine.load(path)
        own = path / f"rank_{self._ranks.rank:05d}.pt"
        # on more ranks than saved it, a new rank has started its generators afresh
        if own.exists():
            restore_random_states(torch.load(own, weights_only=False))


def checkpoint_name(step: int) -> str:
    return f"step_{step:09d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _folders(folder: Path) -> list[Path]:
    """Whatever has the name of a checkpoint below ``folder``, by rising step."""
    return sorted(folder.glob("step_" + "[0-9]" * 9))


def complete_checkpoints(folder: Path) -> list[Path]:
    """The folders below ``folder`` that hold a manifest and every file in its size, by rising step. Not collective."""
    complete = []
    for path in _folders(folder):
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


def _remove(path: Path) -> None:
    """Invisible first, gone afterwards: a removal that is killed leaves no half checkpoint that looks whole."""
    (path / NAME).unlink(missing_ok=True)
    doomed = path.with_name(_DELETING + path.name)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _reason(error: OSError) -> str:
    return f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
