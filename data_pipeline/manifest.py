"""The manifest: what a data set holds, and the hash that is its identity.

Two files. ``shards.parquet`` has one row per shard; ``manifest.json`` has all the rest and is written last, so a folder
that has one is complete. It carries three hashes. ``identity`` covers what a training run can see: the format, the
tokenizer and, per shard, name, domain, split, blocks, tokens and the SHA-256 of the archive. It does not cover sidecars
(they can be rebuilt), provenance, or settings, so the same data prepared elsewhere is the same data set.
``shards.sha256`` is that of ``shards.parquet``, and ``checksum`` covers every other field of the file; these two only
guard against damage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, InstanceOf

from .errors import DataError, UserError
from .files import publish_bytes, publish_json
from .layout import MANIFEST_FILE, SHARD_TABLE_FILE, BlockLayout
from .settings import Settings, build_settings
from .shard_table import HELDOUT, SPLITS, TRAIN, Shard, ShardTable, read_table, table_bytes

__all__ = [
    "FORMAT_VERSION", "HELDOUT", "SPLITS", "TRAIN", "Manifest", "RejectedFile", "Shard", "ShardTable", "load_manifest",
    "read_manifest", "write_manifest",
]  # fmt: skip

FORMAT_VERSION = 2


class RejectedFile(Settings):
    """A file of records that were left out, ``rejected/NAME.parquet``."""

    name: str = Field(pattern=r"^\d{6}$", description="Six digits.")
    rows: int = Field(gt=0, description="Records in it.")
    bytes: int = Field(gt=0, description="Size of the file in bytes.")
    sha256: str = Field(description="Of the file.")


class Manifest(Settings):
    """The content of the two files; :attr:`identity` is computed from it."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    format_version: int = FORMAT_VERSION
    block_tokens: int = Field(gt=0, description="Tokens per block, without the look-ahead token.")
    pack_tokens: int | None = Field(
        default=None, gt=0, description="Tokens per row of best-fit packing; null: documents end to end."
    )
    dtype: Literal["uint16", "uint32"]
    vocab_size: int = Field(gt=0)
    eos_id: int = Field(ge=0)
    bos_id: int
    pad_id: int
    tokenizer_sha256: str = Field(description="Of tokenizer.model.")
    shards: Annotated[InstanceOf[ShardTable], BeforeValidator(ShardTable.of)] = Field(description="In name order.")
    sources: dict[str, dict[str, Any]] = Field(description="Per source: domain and counts.")
    rejected: tuple[RejectedFile, ...] = Field(default=(), description="What was left out, in name order.")
    settings: dict[str, Any] = Field(description="The settings that decide the content.")
    versions: dict[str, str] = Field(default_factory=dict, description="Of headrace and of what it made tokens with.")

    @property
    def layout(self) -> BlockLayout:
        """The arithmetic of this data set's shards."""
        return BlockLayout(self.block_tokens, self.dtype)

    @property
    def identity(self) -> str:
        """Hex SHA-256 over everything a training run can see (the module's docstring says what that is)."""
        unseen = {"shards", "sources", "rejected", "settings", "versions"}
        digest = hashlib.sha256(_canonical(self.model_dump(mode="json", exclude=unseen)))
        self.shards.update_digest(digest)
        return digest.hexdigest()

    @property
    def domains(self) -> tuple[str, ...]:
        """The names of the domains, sorted."""
        return self.shards.domains

    def select(self, domain: str | None, split: str) -> ShardTable:
        """The shards of one domain (``None``: of all domains) and one split, in name order.

        Raises:
            UserError: no shard fits; names the domains and splits that exist.
        """
        chosen = self.shards.split_codes == (SPLITS.index(split) if split in SPLITS else -1)
        if domain is not None:
            code = self.domains.index(domain) if domain in self.domains else -1
            chosen &= self.shards.domain_codes == code
        if not chosen.any():
            known = sorted(f"{group['domain']}/{group['split']}" for group in self.shards.totals())
            wanted = f"{domain or 'any domain'}/{split}"
            raise UserError(f"the data set has no shard of {wanted}. It holds (domain/split): {', '.join(known)}.")
        return self.shards.take(chosen)

    def with_shards(self, shards: Sequence[Shard]) -> Manifest:
        """This manifest with other shards."""
        return self.model_copy(update={"shards": ShardTable.of(shards)})


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Publish ``shards.parquet``, then ``manifest.json``, its hashes included: the last step of a prepare."""
    table = table_bytes(manifest.shards)
    publish_bytes(folder / SHARD_TABLE_FILE, table)
    shards = {
        "file": SHARD_TABLE_FILE,
        "sha256": hashlib.sha256(table).hexdigest(),
        "rows": len(manifest.shards),
        "groups": manifest.shards.totals(),
    }
    content = {
        **manifest.model_dump(mode="json", exclude={"shards"}), "shards": shards, "identity": manifest.identity,
    }  # fmt: skip
    publish_json(folder / MANIFEST_FILE, {**content, "checksum": _hash(content)})


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of the data set ``folder``.

    Raises:
        UserError: the folder or the file is missing, or the format version is another.
        DataError: a file is damaged, or the identity is not the one the content gives.
    """
    if not (folder / MANIFEST_FILE).is_file():
        what = "holds no manifest.json" if folder.is_dir() else "does not exist"
        raise UserError(
            f"data set folder {folder} {what}. Give the folder that `pretrain-data prepare` wrote; "
            "if that command was interrupted, run it again: it continues."
        )
    return load_manifest(lambda name: (folder / name).read_bytes(), str(folder))


def load_manifest(read: Callable[[str], bytes], where: str) -> Manifest:
    """Read and check the manifest of a data set on any storage.

    Args:
        read: the whole content of a file of the data set, by name; what it raises passes through.
        where: the data set, for messages.

    Raises:
        UserError: the format version is another.
        DataError: a file is damaged, or the identity is not the one the content gives.
    """
    path, advice = f"{where}/{MANIFEST_FILE}", "Restore it from a copy, or prepare the data set again in a new folder."
    try:
        content = json.loads(read(MANIFEST_FILE))
    except ValueError as error:
        raise DataError(f"{path} is damaged: it is not valid JSON ({error}). {advice}") from error
    if not isinstance(content, dict) or not {"checksum", "identity", "format_version"} <= content.keys():
        raise DataError(f"{path} is not the manifest of a data set. {advice}")
    if content["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {content['format_version']!r}; this version of headrace reads version "
            f"{FORMAT_VERSION}. Use the headrace that wrote it, or prepare the data set again."
        )
    checksum, identity = content.pop("checksum"), content["identity"]
    if _hash(content) != checksum:
        raise DataError(f"{path} is damaged or was edited: its checksum does not fit its content. {advice}")
    del content["identity"]
    content["shards"] = _read_shards(read, where, content["shards"], advice)
    manifest = build_settings(Manifest, content, path)
    if manifest.identity != identity:
        raise DataError(f"{path}: the root hash {identity} is not that of its content, {manifest.identity}. {advice}")
    return manifest


def _read_shards(read: Callable[[str], bytes], where: str, expected: dict[str, Any], advice: str) -> ShardTable:
    path = f"{where}/{SHARD_TABLE_FILE}"
    try:
        content = read(SHARD_TABLE_FILE)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: it lists the shards of the data set. {advice}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != expected["sha256"]:
        raise DataError(
            f"{path} is damaged or belongs to another data set: its SHA-256 is {found}, manifest.json says "
            f"{expected['sha256']}. {advice}"
        )
    try:
        return read_table(content)
    except ValueError as error:
        raise DataError(f"{path} does not hold a list of shards: {error}. {advice}") from error


def _hash(content: Any) -> str:
    return hashlib.sha256(_canonical(content)).hexdigest()


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
