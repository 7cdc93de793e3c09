"""`pretrain-data inspect`: what a data set holds, samples of it, and how far a unigram model gets on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import DataError
from .kernel import describe
from .layout import TOKENIZER_FILE
from .manifest import HELDOUT, SPLITS, TRAIN, Manifest, Shard, read_manifest
from .shard_reading import read_documents, read_tokens
from .tokenizer import Tokenizer

ALL = "all"

SAMPLE_CHARACTERS = 600
"""Of a sample, in the table for people; the JSON form has it whole."""


def inspect_dataset(folder: Path, samples: int = 0, entropy: bool = False) -> dict[str, Any]:
    """Everything `inspect` prints, as JSON-able values.

    Args:
        folder: the data set.
        samples: documents to decode of every (domain, split), evenly spaced over its shards.
        entropy: also measure :func:`unigram_entropy`.

    Raises:
        UserError: no data set there; DataError: it is damaged.
    """
    manifest = read_manifest(folder)
    report: dict[str, Any] = {
        "folder": str(folder),
        "identity": manifest.identity,
        "vocab_size": manifest.vocab_size,
        "dtype": manifest.dtype,
        "block_tokens": manifest.block_tokens,
        "pack_tokens": manifest.pack_tokens,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "shards": len(manifest.shards),
        "kernel": describe(),
        "groups": manifest.shards.totals(),
        "sources": manifest.sources,
    }
    if samples:
        report["samples"] = sample_documents(folder, manifest, samples)
    if entropy:
        report["entropy"] = unigram_entropy(folder, manifest)
    return report


def unigram_entropy(folder: Path, manifest: Manifest) -> dict[str, dict[str, float]]:
    """Nats per token, EOS included, of the unigram model of all training tokens.

    Returns:
        ``train``: H(p) = -sum p log p, for ``all`` under the distribution of all training tokens, per domain under
        that domain's own. ``heldout``: the cross-entropy of the held-out tokens, ``all`` and per domain, under the
        distribution of all training tokens with one count added to every id (Laplace), so that it is finite. A model
        that has learnt anything beyond token frequencies has a lower held-out loss.
    """
    held = {(group["domain"], group["split"]) for group in manifest.shards.totals()}
    counts = {
        split: {
            domain: _count(folder, manifest, manifest.select(domain, split) if (domain, split) in held else ())
            for domain in manifest.domains
        }
        for split in SPLITS
    }
    for split in SPLITS:
        counts[split][ALL] = np.sum(list(counts[split].values()), axis=0)
    smoothed = counts[TRAIN][ALL] + 1
    nats = -np.log(smoothed / smoothed.sum())
    train = {domain: _entropy(count) for domain, count in counts[TRAIN].items() if count.any()}
    heldout = {domain: float(nats @ count / count.sum()) for domain, count in counts[HELDOUT].items() if count.any()}
    return {TRAIN: train, HELDOUT: heldout}


def sample_documents(folder: Path, manifest: Manifest, samples: int) -> list[dict[str, Any]]:
    """Decoded documents: ``samples`` of every (domain, split), evenly spaced."""
    tokenizer = Tokenizer.load(folder / TOKENIZER_FILE)
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        raise DataError(f"{folder / TOKENIZER_FILE} is not the tokenizer of this data set. Restore it from a copy.")
    found: list[dict[str, Any]] = []
    for group in manifest.shards.totals():
        shards = manifest.select(group["domain"], group["split"])
        count = min(samples, group["documents"])
        wanted = [group["documents"] * i // count for i in range(count)]
        first = 0
        for shard in shards:
            rows = [row - first for row in wanted if first <= row < first + shard.documents]
            found += _decoded(folder, manifest, shard, rows, tokenizer) if rows else []
            first += shard.documents
    return found


def render(report: dict[str, Any]) -> str:
    """The report of :func:`inspect_dataset` as text for people."""
    wide = _width(group["domain"] for group in report["groups"])
    lines = [
        f"data set   {report['folder']}",
        f"identity   {report['identity']}",
        f"tokenizer  {report['vocab_size']:,} pieces, {report['tokenizer_sha256'][:16]}",
        f"format     {report['shards']} shards of blocks of {report['block_tokens']:,} {report['dtype']} tokens",
        f"packing    {_packing(report)}",
        f"kernel     {report['kernel']}",
        "",
        f"{'domain':<{wide}}{'split':<9}"
        f"{'shards':>7}{'documents':>12}{'tokens':>16}{'text bytes':>16}{'bytes/token':>13}",
    ]
    for group in report["groups"]:
        per_token = group["text_bytes"] / (group["tokens"] - group["filling"])
        lines.append(
            f"{group['domain']:<{wide}}{group['split']:<9}{group['shards']:>7,}{group['documents']:>12,}"
            f"{group['tokens']:>16,}{group['text_bytes']:>16,}{per_token:>13.2f}"
        )
    lines += _fates(report["sources"])
    for split, values in report.get("entropy", {}).items():
        what = "unigram entropy" if split == TRAIN else "cross-entropy under all training unigrams"
        lines += ["", f"{split}: {what}, nats per token"]
        lines += [f"  {domain:<14}{value:>8.4f}" for domain, value in values.items()]
    for sample in report.get("samples", ()):
        lines += ["", f"--- {sample['domain']}/{sample['split']} {sample['id']} {sample['url']} "
                      f"({sample['tokens']:,} tokens)", _shortened(sample["text"])]  # fmt: skip
    return "\n".join(lines)


def _fates(sources: dict[str, dict[str, Any]]) -> list[str]:
    """The table of what became of the records of every source; empty where all were kept as they came."""
    wide = _width(sources)
    rows = [row for name, source in sources.items() for row in _fates_of(name, source, wide)]
    if len(rows) == len(sources):
        return []
    return ["", f"{'source':<{wide}}{'records':>12}{'share':>10}{'text bytes':>16}  what became of them", *rows]


def _fates_of(name: str, source: dict[str, Any], wide: int) -> Iterator[str]:
    def row(records: int, text_bytes: int, fate: str, of: str = "") -> str:
        return f"{of:<{wide}}{records:>12,}{records / source['records']:>10.2%}{text_bytes:>16,}  {fate}"

    yield row(source["documents"], source["text_bytes"], "kept", name)
    total = source["text_bytes"]
    if source["empty_documents"]:
        yield row(source["empty_documents"], 0, "empty")
    for stage, reasons in source["rejected"].items():
        for reason, counts in reasons.items():
            yield row(counts["documents"], counts["text_bytes"], f"rejected by {stage}: {reason}")
            total += counts["text_bytes"]
    if source["documents"] != source["records"]:
        yield row(source["records"], total, "all")
    if changed := source["normalised_documents"]:
        yield f"{'':<{wide}}{changed:>12,}{'':>26}  of them changed by normalisation"
    if inexact := source["inexact_documents"]:
        yield f"{'':<{wide}}{inexact:>12,}{'':>26}  of them not exactly tokenised: the tokens do not give the text back"


def _width(names: Iterable[str]) -> int:
    """Characters of a column of ``names``, a blank after the longest included."""
    return max([16, *(len(name) + 1 for name in names)])


def _packing(report: dict[str, Any]) -> str:
    if report["pack_tokens"] is None:
        return "documents end to end"
    filling, tokens = (sum(group[key] for group in report["groups"]) for key in ("filling", "tokens"))
    return f"best fit into rows of {report['pack_tokens']:,} tokens; {filling:,} ({filling / tokens:.2%}) are filling"


def _count(folder: Path, manifest: Manifest, shards: Sequence[Shard]) -> npt.NDArray[np.int64]:
    counts = np.zeros(manifest.vocab_size, np.int64)
    for shard in shards:
        found = np.bincount(read_tokens(folder, manifest, shard), minlength=manifest.vocab_size)
        if len(found) > manifest.vocab_size:
            raise DataError(f"shard {shard.name} of {folder} holds ids beyond the vocabulary. Run `verify`.")
        counts += found
    return counts


def _entropy(counts: npt.NDArray[np.int64]) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def _shortened(text: str) -> str:
    return text if len(text) <= SAMPLE_CHARACTERS else f"{text[:SAMPLE_CHARACTERS]}\n[... {len(text):,} characters]"


def _decoded(
    folder: Path, manifest: Manifest, shard: Shard, rows: list[int], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for row in read_documents(folder, shard).take(rows).to_pylist():
        ids = read_tokens(folder, manifest, shard, row["start"], row["start"] + row["length"] - 1)
        about = {"split": shard.split, "shard": shard.name, "tokens": row["length"], "text": tokenizer.decode(ids)}
        found.append({"domain": row["domain"], "id": row["id"], "url": row["url"], **about})
    return found
