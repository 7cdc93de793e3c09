"""`tokenizer` and `prepare`: the commands that write a data set folder.

All may be killed at any moment and started again: what is published is kept, the rest is done, and the bytes are those
of an undisturbed run, whatever the number of processes and tasks. A plain `prepare` does everything; `--task I --tasks
N` does a share of the first pass that is not complete, and `--merge` publishes what all tasks have done.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..layout import MANIFEST_FILE, BlockLayout
from ..manifest import HELDOUT, TRAIN, Manifest, RejectedFile, Shard, ShardTable, read_manifest, write_manifest
from ..tokenizer import Tokenizer
from .accounts import check_complete, check_files, check_totals, count_sources
from .agreement import (
    Stamps,
    agree_on_plan,
    agree_on_versions,
    check_evaluation_texts,
    check_inputs,
    input_stamps,
    obtain_tokenizer,
    text_versions,
)
from .checked_files import DamagedFileError, publish_record, read_record
from .claims import Claimed, Item, Share, claim
from .compare import CompareJob, compare, dropped_totals, plan_comparisons
from .duplicates import RunFiles
from .gather import Format, ShardJob, gather_shard, plan_shards, shard_jobs
from .parts import PartJob, make_cleaner, part_jobs, tokenise_part
from .rejected import RejectedJob, gather_rejected, plan_rejected
from .settings import PrepareSettings
from .workers import run_jobs
from .workspace import Workspace, open_workspace


def make_tokenizer(settings: PrepareSettings) -> Tokenizer:
    """Train the tokenizer, or take it from a file, into the data set folder; one that is there already stays.

    Raises:
        UserError: the settings or the input are wrong, or are not those of an earlier start.
    """
    with _disk_errors(settings.output), open_workspace(Path(settings.output)) as workspace:
        return obtain_tokenizer(settings, workspace, input_stamps(settings), Share())


def prepare(settings: PrepareSettings) -> Manifest:
    """Write the data set, its tokenizer first if need be, and return its manifest.

    Raises:
        UserError: the settings or the input are wrong, or are not those of an earlier start; the disk is full.
        DataError: a record of the input is no document; the data set was complete and has lost files since; a file
            between the passes is not as it was written.
    """
    with _disk_errors(settings.output), open_workspace(Path(settings.output)) as workspace:
        work = _begin(settings, workspace, Share())
        if work.complete:
            print(_nothing_done(settings), file=sys.stderr)
            return _finished(workspace)
        for stage in work.stages():
            work.advance(stage)
        return work.publish()


def prepare_share(settings: PrepareSettings, share: Share) -> str:
    """Do one task's share of the first pass that is not complete and, when it then is, of the next one.

    Returns:
        One line that says what is left to do, and by whom.

    Raises:
        UserError: as for :func:`prepare`; another process does the same task, or one of its items.
        DataError: as for :func:`prepare`.
    """
    with _disk_errors(settings.output), open_workspace(Path(settings.output), share) as workspace:
        work = _begin(settings, workspace, share)
        if work.complete:
            return _nothing_done(settings)
        for number, stage in enumerate(work.stages(), start=1):
            work.advance(stage)
            if missing := stage.missing():
                return (
                    f"{share}, pass {number} of {settings.passes} ({stage.name}): its share is done; of all tasks' "
                    f"{stage.left(missing)}. When all tasks are through this pass, start all of them again"
                )
        return f"{share}: all {settings.passes} passes are done; publish the data set with --merge"


def merge(settings: PrepareSettings) -> Manifest:
    """Publish the manifest of a data set whose shards the tasks have written.

    Raises:
        UserError: something is not done yet; the settings or the input are not those of the tasks.
        DataError: the data set was complete and has lost files since.
    """
    with _disk_errors(settings.output), open_workspace(Path(settings.output)) as workspace:
        if not workspace.tokenizer.exists():
            raise UserError(f"{settings.output} holds nothing to merge. Run the tasks first (--task I --tasks N).")
        work = _begin(settings, workspace, Share())
        if work.complete:
            print(_nothing_done(settings), file=sys.stderr)
            return _finished(workspace)
        for stage in work.stages():
            if missing := stage.missing():
                raise UserError(
                    f"{settings.output} can't be merged yet: of `{stage.name}`'s {stage.left(missing)}. Start the "
                    "tasks again (--task I --tasks N), or run a plain prepare: it does what is missing."
                )
        return work.publish()


@dataclass(frozen=True)
class _Stage:
    """One pass over all items."""

    name: str
    unit: str
    items: Sequence[Any]
    function: Callable[[Any], None]
    weight: Callable[[Any], int]

    def missing(self) -> list[Any]:
        """The items that no task has done yet."""
        done = {folder: set(os.listdir(folder)) for folder in {item.record.parent for item in self.items}}
        return [item for item in self.items if item.record.name not in done[item.record.parent]]

    def left(self, missing: Sequence[Item]) -> str:
        return f"{len(self.items)} items, {len(missing)} are missing (the first: {missing[0].label})"


@dataclass(frozen=True)
class _Preparation:
    settings: PrepareSettings
    workspace: Workspace
    share: Share
    tokenizer: Tokenizer
    stamps: Stamps

    @property
    def complete(self) -> bool:
        return (self.workspace.folder / MANIFEST_FILE).exists()

    @cached_property
    def parts(self) -> list[PartJob]:
        """The items of the first pass."""
        return part_jobs(self.settings, self.workspace, self.stamps)

    def stages(self) -> Iterator[_Stage]:
        """The passes in their order; each is made when those before are complete."""
        yield _Stage("tokenise", "B", self.parts, tokenise_part, lambda job: job.part.bytes)
        for comparisons in self._comparisons():
            yield _Stage(comparisons[0].title, "item", comparisons, compare, lambda job: 1)
        jobs = [*self._shard_jobs(), *self._rejected_jobs()]
        yield _Stage("write shards", "token", jobs, _write, lambda job: job.tokens)

    def advance(self, stage: _Stage) -> None:
        """Do this task's share of a pass."""
        own = set(map(id, self.share.of(stage.items)))
        items = [item for item in stage.missing() if id(item) in own]
        if shards := [item for item in items if isinstance(item, ShardJob)]:
            _check_space(self.workspace.folder, shards)
        function = Claimed(stage.function, self.workspace.claims, self.share)
        run_jobs(function, items, self.settings.processes, stage.name, stage.unit, stage.weight)

    def publish(self) -> Manifest:
        """Write the manifest, the last step, once what it counts is seen to be there."""
        check_inputs(self.settings, self.workspace)
        check_evaluation_texts(self.settings, self.workspace)
        sources = count_sources(self.settings, self.part_records, self._dropped())
        shards = [Shard.model_validate(record) for record in self._records(self._shard_jobs())]
        rejected = [RejectedFile.model_validate(record) for record in self._records(self._rejected_jobs())]
        check_files(self.workspace, shards, rejected)
        manifest = _manifest(self.settings, self.tokenizer, shards, sources, rejected)
        check_totals(manifest)
        _warn_of_missing_splits(self.settings, manifest)
        write_manifest(self.workspace.folder, manifest)
        return _finished(self.workspace)

    def _shard_jobs(self) -> list[ShardJob]:
        settings, workspace = self.settings, self.workspace
        with claim(workspace.claims, "the shard plan", self.share, wait=True):
            if not workspace.shard_plan.exists():
                dropped = self._dropped()
                count_sources(settings, self.part_records, dropped)
                plan_shards(workspace, self.part_records, dropped, settings.shard_tokens, settings.processes)
        layout = BlockLayout(settings.block_tokens, self.tokenizer.dtype)
        return shard_jobs(workspace, Format(layout, self.tokenizer.eos_id, settings.pack_tokens))

    def _comparisons(self) -> list[list[CompareJob]]:
        if not self.settings.cleaning.compares:
            return []
        runs = self._runs()
        return plan_comparisons(self.workspace.duplicates, runs, tuple(self.settings.sources), self.settings.cleaning)

    def _rejected_jobs(self) -> list[RejectedJob]:
        return plan_rejected(
            self.workspace.folder,
            self.part_records,
            [part.rejected for part in self.parts],
            self._runs(),
            tuple(self.settings.sources),
            self._dropped(),
            self.settings.cleaning.rejected_characters,
        )

    def _runs(self) -> list[RunFiles]:
        numbers = {source: number for number, source in enumerate(self.settings.sources)}
        return [
            RunFiles(
                path=str(self.workspace.parts / run["name"]),
                source=numbers[record["source"]],
                train=run[TRAIN]["documents"],
                documents=run[TRAIN]["documents"] + run[HELDOUT]["documents"],
            )
            for record in self.part_records
            for run in record["runs"]
        ]

    def _dropped(self) -> dict[str, dict[str, Any]]:
        return dropped_totals(self.workspace.duplicates) if self.settings.cleaning.compares else {}

    @cached_property
    def part_records(self) -> list[dict[str, Any]]:
        """What the first pass recorded of each part. The first to ask, when all parts are done, puts it into one file,
        so that not every task reads the file of every part."""
        path = self.workspace.part_records
        if not path.exists():
            with claim(self.workspace.claims, "the part records", self.share, wait=True):
                if not path.exists():
                    publish_record(path, self._records(self.parts))
        records: list[dict[str, Any]] = read_record(path)
        return records

    def _records(self, items: Sequence[Item]) -> list[dict[str, Any]]:
        return [read_record(item.record) for item in items]


def _begin(settings: PrepareSettings, workspace: Workspace, share: Share) -> _Preparation:
    stamps = input_stamps(settings)
    tokenizer = obtain_tokenizer(settings, workspace, stamps, share)
    agree_on_plan(settings, workspace, stamps, tokenizer, share)
    work = _Preparation(settings, workspace, share, tokenizer, stamps)
    if work.complete:
        check_complete(workspace.folder, read_manifest(workspace.folder))
        return work
    agree_on_versions(workspace, share)
    if share.task == 0:
        _warn_of_input(settings)
    return work


def _warn_of_input(settings: PrepareSettings) -> None:
    for name, source in settings.sources.items():
        for doubt in source.doubts(settings.storage):
            _warn(f"source {name!r}: {doubt}.")
    if ignored := make_cleaner(settings.cleaning).ignored_evaluation_texts:
        _warn(f"{ignored} evaluation texts are shorter than decontaminate.min_units and are not looked for.")


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _write(job: ShardJob | RejectedJob) -> None:
    if isinstance(job, ShardJob):
        gather_shard(job)
    else:
        gather_rejected(job)


def _check_space(folder: Path, jobs: Sequence[ShardJob]) -> None:
    needed = sum(job.format.layout.shard_bytes(job.format.layout.blocks(job.tokens)) for job in jobs)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} needs {needed:,} bytes for its shards and its disk has {free:,} left. Free some and start the "
            "same command again: it continues."
        )


def _warn_of_missing_splits(settings: PrepareSettings, manifest: Manifest) -> None:
    held = {(group["domain"], group["split"]) for group in manifest.shards.totals()}
    for domain in manifest.domains:
        if (domain, TRAIN) not in held:
            _warn(
                f"domain {domain!r} has no training document: all of its few fell into heldout_fraction = "
                f"{settings.heldout_fraction}. It can't be trained on; lower heldout_fraction, or add text."
            )
        elif (domain, HELDOUT) not in held and settings.heldout_fraction:
            _warn(
                f"domain {domain!r} has no held-out document: none of its few fell into heldout_fraction = "
                f"{settings.heldout_fraction}. It can't be evaluated; raise heldout_fraction, or add text."
            )


def _nothing_done(settings: PrepareSettings) -> str:
    return (
        f"{settings.output} is complete already: nothing was done. For another data set give another `output`, or "
        "delete that folder."
    )


def _finished(workspace: Workspace) -> Manifest:
    """Drop what only a restart needs; the records of what was asked for stay."""
    for folder in workspace.passing:
        shutil.rmtree(folder)
    for path in (workspace.part_records, workspace.shard_plan, workspace.shard_runs):
        path.unlink(missing_ok=True)
    return read_manifest(workspace.folder)


def _manifest(
    settings: PrepareSettings,
    tokenizer: Tokenizer,
    shards: Sequence[Shard],
    sources: dict[str, dict[str, Any]],
    rejected: Sequence[RejectedFile],
) -> Manifest:
    return Manifest(
        block_tokens=settings.block_tokens,
        pack_tokens=settings.pack_tokens,
        dtype="uint16" if tokenizer.dtype == "uint16" else "uint32",
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        bos_id=tokenizer.bos_id,
        pad_id=tokenizer.pad_id,
        tokenizer_sha256=tokenizer.sha256,
        shards=ShardTable.of(shards),
        sources=sources,
        rejected=tuple(rejected),
        settings=settings.content,
        versions={"headrace": importlib.metadata.version("headrace"), **text_versions()},
    )


@contextmanager
def _disk_errors(output: str) -> Iterator[None]:
    try:
        yield
    except DamagedFileError as error:
        raise Workspace(Path(output)).written_anew(error) from error
    except OSError as error:
        raise UserError(
            f"{output}: {error.strerror or f'not all was written, as on a full disk ({error})'} "
            f"({error.filename or 'while writing'}). Mend that and start the same command again: it continues."
        ) from error
