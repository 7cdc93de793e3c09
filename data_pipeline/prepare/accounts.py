"""What each source gave and what was left out of it, so that every record is accounted for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import HeadraceError, UserError
from .settings import PrepareSettings

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


def check_documents(sources: Mapping[str, dict[str, Any]], documents: int) -> None:
    """Compare the sources' documents with those of all shards.

    Raises:
        HeadraceError: they differ, so something was lost or doubled on the way.
    """
    counted = sum(source["documents"] for source in sources.values())
    if counted != documents:
        raise HeadraceError(
            f"the sources gave {counted:,} documents and the shards hold {documents:,}. Nothing was published; delete "
            "the output folder and prepare again, and report this."
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
    counted = [f"{rejected_documents({stage: reasons})} by {stage}" for stage, reasons in rejected.items()]
    return f" ({', '.join(counted)})" if counted else ""
