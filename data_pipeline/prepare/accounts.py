"""What each source gave and what was left out of it, so that every record is accounted for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError, HeadraceError, UserError
from ..layout import documents_path, index_path, index_size, rejected_path, shard_path
from ..manifest import Manifest, RejectedFile, Shard
from .settings import PrepareSettings
from .workspace import Workspace

_SUMMED = (
    "records",
    "documents",
    "empty_documents",
    "normalised_documents",
    "inexact_documents",
    "text_bytes",
    "tokens",
)

Rejected = dict[str, dict[str, dict[str, int]]]
"""stage -> reason -> ``documents``, ``text_bytes``"""


def count_rejected(counts: Rejected, stage: str, reason: str, text_bytes: int) -> None:
    """Add one rejected document to ``counts``."""
    one = counts.setdefault(stage, {}).setdefault(reason, {"documents": 0, "text_bytes": 0})
    one["documents"] += 1
    one["text_bytes"] += text_bytes


def count_sources(
    settings: PrepareSettings, records: Sequence[dict[str, Any]], dropped: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The ``sources`` of the manifest.

    Per source: ``domain``; ``records`` that were read; ``documents``, ``text_bytes``, ``tokens`` (EOS included) that
    are in the data set; ``empty_documents`` and ``rejected`` (stage -> reason -> documents, text_bytes), which are not;
    ``normalised_documents`` that normalisation changed and ``inexact_documents`` whose tokens do not stand for all
    their bytes, both counted before duplicates went. ``records`` is the sum of the documents kept, empty and rejected.

    Args:
        records: what the first pass recorded of each part.
        dropped: :func:`.compare.dropped_totals`; empty before duplicates are decided, or if they stay.

    Raises:
        UserError: a source gave no document.
    """
    return {
        name: _count_source(name, source.domain, [record for record in records if record["source"] == name], dropped)
        for name, source in settings.sources.items()
    }


def check_files(workspace: Workspace, shards: Sequence[Shard], rejected: Sequence[RejectedFile]) -> None:
    """Look whether the files that completion records speak of are there.

    Raises:
        UserError: one is missing or has another size. Its record is taken away, so that the next start writes it again.
    """
    folder = workspace.folder
    lost: list[str] = []
    for record, path in _changed_files(folder, shards, rejected):
        lost.append(str(path.relative_to(folder)))
        (workspace.shard_records / record).unlink(missing_ok=True)
    if lost:
        raise UserError(
            f"{folder}: {', '.join(lost[:3])}{' ...' if len(lost) > 3 else ''} ({len(lost)} files) were "
            "written, but are missing or cut now. Nothing was published; start again (with tasks: all of them): what "
            "is lost is written again."
        )


def check_complete(folder: Path, manifest: Manifest) -> None:
    """Look whether a data set that has its manifest has its files too; contents are `verify`'s to read.

    Raises:
        DataError: one is missing or has another size; names the first few, and says what can be done.
    """
    lost = [str(path.relative_to(folder)) for _, path in _changed_files(folder, manifest.shards, manifest.rejected)]
    if lost:
        raise DataError(
            f"{folder} was complete, but {', '.join(lost[:3])}{' ...' if len(lost) > 3 else ''} ({len(lost)} files) "
            f"are missing or have another size now. Restore them from a copy; `pretrain-data verify "
            f"--rebuild-sidecars {folder}` writes .idx files again; or prepare into a new `output`: the same input and "
            "settings give the same bytes."
        )


def _changed_files(
    folder: Path, shards: Sequence[Shard], rejected: Sequence[RejectedFile]
) -> Iterator[tuple[str, Path]]:
    """Each file that is missing or not as large as it was written, after the name of its completion record.

    The size of a table of documents is written down nowhere: it has to be there and not empty.
    """
    written: list[tuple[str, Path, int | None]] = []
    for shard in shards:
        name = f"{shard.name}.json"
        written.append((name, shard_path(folder, shard.name), shard.bytes))
        written.append((name, index_path(folder, shard.name), index_size(shard.blocks)))
        written.append((name, documents_path(folder, shard.name), None))
    for file in rejected:
        written.append((f"rejected-{file.name}.json", rejected_path(folder, file.name), file.bytes))
    for record, path, size in written:
        found = path.stat().st_size if path.is_file() else 0
        if found != size if size is not None else not found:
            yield record, path


def check_totals(manifest: Manifest) -> None:
    """Compare what the sources gave with what all shards, and the files of rejected records, hold.

    Raises:
        HeadraceError: they differ, so something was lost or doubled on the way.
    """
    groups, sources = manifest.shards.totals(), manifest.sources.values()
    for what in ("documents", "tokens", "text_bytes"):
        given = sum(source[what] for source in sources)
        held = sum(group[what] - (group["filling"] if what == "tokens" else 0) for group in groups)
        _equal(what, "shards", given, held)
    given = sum(rejected_documents(source["rejected"]) for source in sources)
    _equal("rejected records", "files of rejected records", given, sum(file.rows for file in manifest.rejected))


def _equal(what: str, where: str, given: int, held: int) -> None:
    if given != held:
        raise HeadraceError(
            f"the sources gave {given:,} {what} and the {where} hold {held:,}. Nothing was published; delete the "
            "output folder and prepare again, and report this."
        )


def rejected_documents(rejected: Rejected) -> int:
    """How many documents the counts stand for."""
    return sum(one["documents"] for reasons in rejected.values() for one in reasons.values())


def _count_source(
    name: str, domain: str, own: Sequence[dict[str, Any]], dropped: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    counts: dict[str, Any] = {key: sum(record[key] for record in own) for key in _SUMMED}
    parts = [record["rejected"] for record in own]
    if name in dropped:
        duplicates = dropped[name]
        counts["documents"] -= duplicates["documents"]
        counts["text_bytes"] -= duplicates["text_bytes"]
        counts["tokens"] -= sum(duplicates["tokens"].values())
        parts.append(duplicates["rejected"])
    rejected = _sum(parts)
    if counts["documents"] == 0:
        raise UserError(
            f"source {name!r} holds no document but {counts['empty_documents']} empty ones and "
            f"{rejected_documents(rejected)} rejected ones{_stages(rejected)}. Take it out of `sources`, or mend its "
            "settings or those of `cleaning`."
        )
    if counts["records"] != counts["documents"] + counts["empty_documents"] + rejected_documents(rejected):
        raise HeadraceError(
            f"source {name!r}: the {counts['records']:,} records read are not the sum of {counts['documents']:,} "
            f"documents, {counts['empty_documents']:,} empty and {rejected_documents(rejected):,} rejected ones. "
            "Nothing was published; delete the output folder and prepare again, and report this."
        )
    return {"domain": domain, **counts, "rejected": rejected}


def _sum(parts: Sequence[Rejected]) -> Rejected:
    total: Rejected = {}
    for part in parts:
        for stage, reasons in part.items():
            for reason, counts in reasons.items():
                one = total.setdefault(stage, {}).setdefault(reason, {"documents": 0, "text_bytes": 0})
                for key, value in counts.items():
                    one[key] += value
    return total


def _stages(rejected: Rejected) -> str:
    counted = [
        f"{one['documents']:,} by {stage}: {reason}"
        for stage, reasons in sorted(rejected.items())
        for reason, one in sorted(reasons.items(), key=lambda item: (-item[1]["documents"], item[0]))
    ]
    more = f" and {len(counted) - 5} more reasons" if len(counted) > 5 else ""
    return f" ({', '.join(counted[:5])}{more})" if counted else ""
