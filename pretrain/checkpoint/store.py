"""Checkpoints of a run: complete or invisible, found by looking at them, kept by rule (laws 4 and 5).

::

    checkpoints/step_000000500/
        MANIFEST.json     written last: every file with size and hash
        state.json        step, position, tokens, what the data, model and topology were
        layout.json       where every element of weights and optimizer state lies, by name (pretrain.engine.layout)
        rank_00000.pt     random states of each rank
        deepspeed/        what DeepSpeed saves, readable by its own tools

A checkpoint is written in ``.saving_step_...``, flushed, given its manifest and renamed. Nothing points to the newest
one: it is the complete folder with the highest step. All of that may go on beside the training
(``checkpoint.asynchronous``): only the copy of the state is then waited for, and the ranks agree between two steps.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from data_pipeline.errors import DataError, HeadraceError, UserError
from data_pipeline.files import fsync_folder, publish, publish_json
from pretrain.agreement import together
from pretrain.config import CheckpointSettings
from pretrain.distributed import Distributed
from pretrain.engine import Engine

from .beside import Beside, Parts
from .folders import DELETING, SAVING, checkpoint_name, complete_checkpoints, reason, remove, step_folders, step_of
from .manifest import NAME, FileRecord, problems, read_manifest, record_file, write_manifest
from .random_state import random_states, restore_random_states
from .second import SecondPlace, attempt_copy, failure_of, fetch_all, second_place

T = TypeVar("T")


class CheckpointError(HeadraceError):
    """A checkpoint could not be written; the ones before it are untouched."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is published."""

    path: Path
    copied_to: str | None = None
    """The address in the second place."""
    warning: str | None = None
    """Why there is no copy in the second place, though one was wanted."""


class CheckpointStore:
    """The checkpoints below one folder. All methods but the constructor and :attr:`busy` are collective.

    Args:
        folder: the run's ``checkpoints`` folder, in a folder of the run's name; made if missing.
        settings: what to keep, and how to save.
        ranks: this process among its peers.
    """

    def __init__(self, folder: Path, settings: CheckpointSettings, ranks: Distributed) -> None:
        self._folder = folder
        self._settings = settings
        self._ranks = ranks
        self._pool = ThreadPoolExecutor(1, "checkpoint") if settings.asynchronous else None
        self._saving: Beside[Saved] | None = None
        self._second = second_place(settings, folder.parent.name)
        if ranks.rank == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for leftover in [*folder.glob(f"{SAVING}*"), *folder.glob(f"{DELETING}*")]:
                    shutil.rmtree(leftover)
            except OSError as error:
                raise UserError(
                    f"{folder} can't be written or cleared of an unfinished save: {reason(error)}. Mend that."
                ) from error

    def save(self, engine: Engine, state: Mapping[str, Any]) -> Path:
        """Write and publish the checkpoint of ``state["step"]``, then remove what the rules no longer keep.

        Raises:
            CheckpointError: on every rank, when any of them could not write.
        """
        self.begin_save(engine, state)
        saved = self.finish_save()
        assert saved is not None
        return saved.path

    def begin_save(self, engine: Engine, state: Mapping[str, Any]) -> None:
        """As :meth:`save`, but where it is asynchronous return as soon as the engine may go on.

        Waits for a save that still goes on. Errors are raised here, by :meth:`advance_save` or :meth:`finish_save`.
        """
        self.finish_save()
        self._saving = Beside(self._save(engine, dict(state)), self._pool)

    @property
    def saving(self) -> bool:
        """Whether a save goes on; the same on every rank."""
        return self._saving is not None

    @property
    def busy(self) -> bool:
        """Whether this rank works for a save right now."""
        return self._saving is not None and self._saving.busy

    def advance_save(self) -> Saved | None:
        """What is to be agreed on, when no rank is :attr:`busy`; the checkpoint when all is done."""
        return self._go_on(lambda saving: saving.finish() if saving.advance() else None)

    def finish_save(self) -> Saved | None:
        """Wait for the save that goes on and return its checkpoint; None where there is none."""
        return self._go_on(lambda saving: saving.finish())

    def _go_on(self, act: Callable[[Beside[Saved]], Saved | None]) -> Saved | None:
        saving, self._saving = self._saving, None
        if saving is None:
            return None
        saved = act(saving)
        if saved is None:
            self._saving = saving
        return saved

    def _save(self, engine: Engine, state: dict[str, Any]) -> Parts[Saved]:
        """One save: what each rank does by itself is yielded, what they agree on stands between."""
        name = checkpoint_name(state["step"])
        draft, final = self._folder / f"{SAVING}{name}", self._folder / name
        failed = f"checkpoint {name} could not be saved"
        _, failure = _try(draft.mkdir) if self._ranks.rank == 0 else (None, None)
        self._agree(failure, failed, draft)
        write = engine.begin_save(draft, later=self._pool is not None)
        files, failure = yield partial(_try, partial(self._write, draft, write, random_states(), state))
        self._agree(failure, failed, draft)
        everything = [file for part in self._ranks.gather_objects(files) for file in part or []]
        # every rank comes to as many pieces of work
        told = yield partial(self._publish, draft, final, everything) if self._ranks.rank == 0 else _nothing
        failure, failed = self._ranks.broadcast_object(told)
        self._agree(failure if self._ranks.rank == 0 else None, failed, draft)
        return Saved(final) if self._second is None else (yield from self._copy(self._second, final, files or []))

    def _copy(self, second: SecondPlace, final: Path, files: list[FileRecord]) -> Parts[Saved]:
        """Bring the checkpoint to the second place, each rank what it has written."""
        assert self._settings.second is not None
        failure = yield partial(failure_of, partial(second.put, final, files))
        failures = self._ranks.gather_objects(failure)
        if not any(failures):
            everything = self._ranks.broadcast_object(read_manifest(final))
            publish = partial(failure_of, partial(self._publish_copy, second, final.name, everything or []))
            failures = self._ranks.gather_objects((yield publish if self._ranks.rank == 0 else _nothing))
        where = f"{second.address}/{final.name}"
        if not any(failures):
            return Saved(final, where)
        told = "; ".join(f"rank {rank}: {failure}" for rank, failure in enumerate(failures) if failure)
        message = f"checkpoint {final.name} is saved below {self._folder}, but could not be copied to {where}: {told}."
        if self._settings.second.on_failure == "stop":
            raise CheckpointError(
                f"{message} Mend that place (or set checkpoint.second.on_failure=warn), then start again."
            )
        return Saved(final, warning=message)

    def _publish_copy(self, second: SecondPlace, name: str, files: list[FileRecord]) -> None:
        assert self._settings.second is not None
        last = self._settings.second.keep_last
        second.reveal(name, files)
        second.remove_others(lambda complete: {*complete[-last:], name, *self._for_good(complete)})

    def _for_good(self, names: Sequence[str]) -> set[str]:
        every = self._settings.keep_every
        return {name for name in names if every and step_of(Path(name)) % every == 0}

    def _write(
        self, draft: Path, write: Callable[[], list[Path]], randoms: dict[str, Any], state: dict[str, Any]
    ) -> list[FileRecord]:
        """All files of this rank, with their hashes."""
        written = write()
        own = draft / f"rank_{self._ranks.rank:05d}.pt"
        with publish(own) as handle:
            torch.save(randoms, handle)
        written.append(own)
        if self._ranks.rank == 0:
            publish_json(draft / "state.json", state)
            written.append(draft / "state.json")
        return [record_file(draft, path) for path in written]

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

    def _publish(self, draft: Path, final: Path, files: list[FileRecord]) -> tuple[str | None, str]:
        """Make the checkpoint visible and remove old ones; why the disk did not let it, and what that means."""
        _, failure = _try(partial(self._reveal, draft, final, files))
        if failure:
            return failure, f"checkpoint {final.name} could not be saved"
        _, failure = _try(partial(self._remove_old, final))
        return failure, "a checkpoint that is no longer kept could not be removed"

    def _reveal(self, draft: Path, final: Path, files: list[FileRecord]) -> None:
        for folder in {(draft / file.path).parent for file in files}:
            fsync_folder(folder)
        write_manifest(draft, files)
        if final.exists():
            # only a broken folder can stand there: a run never saves a step that it could have resumed from
            remove(final)
        os.rename(draft, final)
        fsync_folder(self._folder)

    def _remove_old(self, newest: Path) -> None:
        complete = complete_checkpoints(self._folder)
        names = [path.name for path in complete]
        keep = {*names[-self._settings.keep_last :], newest.name, *self._for_good(names)}
        for path in complete:
            if path.name not in keep:
                remove(path)

    def find(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint whose every byte is as it was saved, and what was wrong with newer ones.

        A folder with a manifest was complete once: whatever it lacks now is damage, which is told. One without was
        never finished, or its removal was interrupted. The hashes are checked by all ranks together, each a share of
        the files. A newer one in the second place is fetched first.

        Raises:
            DataError: there are checkpoints but every one of them is damaged; or there is none, and whether the second
                place has one can't be seen.
        """
        found: list[str] = []
        damaged: list[Path] = []
        intact: Path | None = None
        marked = [path for path in step_folders(self._folder) if (path / NAME).exists()]
        for path in reversed(self._ranks.broadcast_object(marked)):
            if not (damage := self.damage(path)):
                intact = path
                break
            found += damage
            damaged.append(path)
        fetched = self._fetch_newer(intact, found) if self._second else None
        if damaged and not (intact or fetched):
            raise DataError(
                f"every checkpoint below {self._folder} is damaged: {'; '.join(found)}. Restore one of them from a "
                "copy, or start over with resume=never."
            )
        self._set_aside(damaged)
        if fetched is not None:
            if self._ranks.rank == 0:
                self._reveal(self._folder / f"{SAVING}{fetched[0].name}", *fetched)
            self._ranks.barrier()
            return fetched[0], found
        return intact, found

    def newest(self) -> Path | None:
        """The newest complete checkpoint, as :meth:`find` would take it; one that only the second place has is fetched.

        Hashes are not read of one that lies in the run folder.

        Raises:
            DataError: as :meth:`find`.
        """
        looked = together(self._ranks, lambda: self._look() if self._ranks.rank == 0 else (None, None))
        here, there = self._ranks.broadcast_object(looked)
        if there is not None and (here is None or there > here.name):
            return self.find()[0]
        return here

    def _look(self) -> tuple[Path | None, str | None]:
        """The newest complete checkpoint in the run folder, and the name of that in the second place, if it answers."""
        here = complete_checkpoints(self._folder)
        names = (attempt_copy(self._second.complete)[0] or []) if self._second else []
        return here[-1] if here else None, names[-1] if names else None

    def _fetch_newer(self, intact: Path | None, found: list[str]) -> tuple[Path, list[FileRecord]] | None:
        """Bring the newest checkpoint of the second place that is newer than ``intact`` into a draft in the first.

        Adds to ``found`` what kept one from being used. Returns where it is to lie, and its files.
        """
        second = self._second
        assert second is not None
        names, failure = self._ranks.broadcast_object(
            attempt_copy(second.complete) if self._ranks.rank == 0 else ([], None)
        )
        if failure and intact is None:
            raise DataError(
                f"whether there is a checkpoint in {second.address} can't be seen: {failure}. Mend that, or take out "
                "checkpoint.second to start without it."
            )
        if failure:
            found.append(f"whether there is a newer checkpoint in {second.address} can't be seen: {failure}")
        for name in reversed(names or []):
            if intact is not None and name <= intact.name:
                break
            draft = self._folder / f"{SAVING}{name}"
            files, failure = self._ranks.broadcast_object(
                attempt_copy(partial(second.manifest, name)) if self._ranks.rank == 0 else ([], None)
            )
            if not failure:
                share = (files or [])[self._ranks.rank :: self._ranks.world_size]
                failure = failure_of(partial(fetch_all, second, name, share, draft))
            failures = [each for each in self._ranks.gather_objects(failure) if each]
            if not failures:
                return self._folder / name, files or []
            found.append(f"{second.address}/{name} can't be used: {'; '.join(sorted(set(failures)))}")
            if self._ranks.rank == 0:
                shutil.rmtree(draft, ignore_errors=True)
            self._ranks.barrier()
        return None

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


def _try(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """What ``action`` returns, or why the disk did not let it."""
    try:
        return action(), None
    except OSError as error:
        return None, reason(error)


def _nothing() -> None:
    """The piece of work of a rank that waits for another's."""
