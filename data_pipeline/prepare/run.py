"""`tokenizer` and `prepare`: the two commands that write a data set folder.

Both may be killed at any moment and started again: what is published is kept, the rest is done, and the bytes are
those of an undisturbed run.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import publish_bytes
from ..layout import MANIFEST_FILE, BlockLayout
from ..manifest import Manifest, Shard, ShardTable, read_manifest, write_manifest
from ..tokenizer import Tokenizer
from .gather import gather_shard, plan_shards
from .parts import PartJob, tokenise_part
from .settings import PrepareSettings
from .train_tokenizer import train_tokenizer
from .workers import run_jobs
from .workspace import Workspace, open_workspace


def make_tokenizer(settings: PrepareSettings) -> Tokenizer:
    """Train the tokenizer, or take it from a file, into the data set folder; one that is there already stays.

    Raises:
        UserError: the settings or the input are wrong, or are not those of an earlier start.
    """
    with _disk_errors(settings.output), open_workspace(Path(settings.output)) as workspace:
        return _tokenizer(settings, workspace, _stamps(settings))


def prepare(settings: PrepareSettings) -> Manifest:
    """Write the data set, its tokenizer first if need be, and return its manifest.

    Raises:
        UserError: the settings or the input are wrong, or are not those of an earlier start; the disk is full.
        DataError: a record of the input is no document.
    """
    folder = Path(settings.output)
    with _disk_errors(settings.output), open_workspace(folder) as workspace:
        stamps = _stamps(settings)
        tokenizer = _tokenizer(settings, workspace, stamps)
        plan = {"settings": settings.content, "part_bytes": settings.part_bytes, "tokenizer": tokenizer.sha256}
        workspace.agree("plan", {**plan, "input": stamps})
        if (folder / MANIFEST_FILE).exists():
            return _finished(workspace)
        jobs = _part_jobs(settings, workspace)
        records = run_jobs(tokenise_part, jobs, settings.processes, "tokenise", "B", lambda job: job.part.bytes)
        sources = _count_sources(settings, records)
        layout = BlockLayout(settings.block_tokens, tokenizer.dtype)
        shard_jobs = plan_shards(workspace, records, layout, settings.shard_tokens, tokenizer.eos_id)
        _check_space(folder, sum(layout.shard_bytes(layout.blocks(job.tokens)) for job in shard_jobs))
        shards = run_jobs(gather_shard, shard_jobs, settings.processes, "write shards", "token", lambda job: job.tokens)
        write_manifest(folder, _manifest(settings, tokenizer, shards, sources))
        return _finished(workspace)


def _stamps(settings: PrepareSettings) -> dict[str, Any]:
    return {name: source.stamp() for name, source in settings.sources.items()}


def _tokenizer(settings: PrepareSettings, workspace: Workspace, stamps: dict[str, Any]) -> Tokenizer:
    if workspace.tokenizer.exists() and not (workspace.work / "tokenizer.json").exists():
        raise UserError(
            f"{workspace.tokenizer} was not made here, so it is unknown from what. Move it elsewhere and name it as "
            "tokenizer.path."
        )
    wanted: dict[str, Any] = {"tokenizer": settings.tokenizer.model_dump(mode="json")}
    if settings.tokenizer.path is not None:
        tokenizer = Tokenizer.load(Path(settings.tokenizer.path))
        workspace.agree("tokenizer", {**wanted, "sha256": tokenizer.sha256})
        publish_bytes(workspace.tokenizer, tokenizer.model)
        return tokenizer
    assert settings.tokenizer.train is not None
    wanted |= {
        "sources": settings.content["sources"],
        "heldout_fraction": settings.heldout_fraction,
        "input": stamps,
    }
    workspace.agree("tokenizer", wanted)
    if workspace.tokenizer.exists():
        return Tokenizer.load(workspace.tokenizer)
    tokenizer = train_tokenizer(settings.tokenizer.train, settings.sources, settings.heldout_fraction)
    publish_bytes(workspace.tokenizer, tokenizer.model)
    return tokenizer


def _part_jobs(settings: PrepareSettings, workspace: Workspace) -> list[PartJob]:
    jobs: list[PartJob] = []
    for name, source in settings.sources.items():
        for part in source.parts(settings.part_bytes):
            jobs.append(
                PartJob(
                    number=len(jobs),
                    source_name=name,
                    source=source,
                    part=part,
                    folder=workspace.parts,
                    tokenizer=workspace.tokenizer,
                    seed=settings.seed,
                    heldout_fraction=settings.heldout_fraction,
                    run_bytes=settings.part_bytes,
                )
            )
    return jobs


def _count_sources(settings: PrepareSettings, records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What each source gave, for the manifest.

    Raises:
        UserError: a source gave no document.
    """
    counted: dict[str, dict[str, Any]] = {}
    for name, source in settings.sources.items():
        own = [record for record in records if record["source"] == name]
        keys = ("documents", "empty_documents", "inexact_documents", "text_bytes", "tokens")
        counts = {key: sum(record[key] for record in own) for key in keys}
        if counts["documents"] == 0:
            raise UserError(
                f"source {name!r} holds no document but {counts['empty_documents']} empty ones. "
                "Take it out of `sources`, or mend its settings."
            )
        counted[name] = {"domain": source.domain, **counts}
    return counted


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} needs {needed:,} bytes for its shards and its disk has {free:,} left. Free some and start the "
            "same command again: it continues."
        )


def _finished(workspace: Workspace) -> Manifest:
    """Drop what only a restart needs; the records of what was asked for stay."""
    shutil.rmtree(workspace.parts)
    shutil.rmtree(workspace.shard_records)
    return read_manifest(workspace.folder)


def _manifest(
    settings: PrepareSettings, tokenizer: Tokenizer, shards: Sequence[Shard], sources: dict[str, dict[str, Any]]
) -> Manifest:
    return Manifest(
        block_tokens=settings.block_tokens,
        dtype="uint16" if tokenizer.dtype == "uint16" else "uint32",
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        bos_id=tokenizer.bos_id,
        pad_id=tokenizer.pad_id,
        tokenizer_sha256=tokenizer.sha256,
        shards=ShardTable.of(shards),
        sources=sources,
        settings=settings.content,
    )


@contextmanager
def _disk_errors(output: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{output}: {error.strerror or error} ({error.filename or 'while writing'}). Mend that and start the same "
            "command again: it continues."
        ) from error
