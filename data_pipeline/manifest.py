"""The manifest: what a data set holds, and the hash that is its identity.

``manifest.json`` is written last, so a folder that has one is complete. It carries two hashes. ``identity`` covers
what a training run can see: the format, the tokenizer and, per shard, domain, split, token count and the SHA-256 of
the archive. It does not cover sidecars (they can be rebuilt), provenance, or settings, so the same data prepared
elsewhere is the same data set. ``checksum`` covers every other field of the file and only guards it against damage.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from .errors import DataError, UserError
from .files import publish_json
from .layout import MANIFEST_FILE, BlockLayout
from .settings import Settings, build_settings

FORMAT_VERSION = 1

TRAIN = "train"
HELDOUT = "heldout"
SPLITS = (TRAIN, HELDOUT)


class Shard(Settings):
    """One archive: documents of one domain and one split."""

    name: str = Field(pattern=r"^\d{6}$", description="Six digits; the archive is shards/NAME.tar.")
    domain: str
    split: Literal["train", "heldout"]
    bytes: int = Field(gt=0, description="Size of the archive in bytes.")
    blocks: int = Field(gt=0, description="Members of the archive.")
    tokens: int = Field(gt=0, description="Valid tokens, the EOS of each document included, the filling left out.")
    documents: int = Field(gt=0)
    text_bytes: int = Field(ge=0, description="UTF-8 bytes of the documents' text.")
    sha256: str = Field(description="Of the archive.")
    idx_sha256: str = Field(description="Of the block index.")
    docs_sha256: str = Field(description="Of the document table.")


class Manifest(Settings):
    """The content of ``manifest.json``; :attr:`identity` is computed from the other fields."""

    format_version: int = FORMAT_VERSION
    block_tokens: int = Field(gt=0, description="Tokens per block, without the look-ahead token.")
    dtype: Literal["uint16", "uint32"]
    vocab_size: int = Field(gt=0)
    eos_id: int = Field(ge=0)
    bos_id: int
    pad_id: int
    tokenizer_sha256: str = Field(description="Of tokenizer.model.")
    shards: tuple[Shard, ...] = Field(description="In name order.")
    sources: dict[str, dict[str, Any]] = Field(description="Per source: domain and counts.")
    settings: dict[str, Any] = Field(description="The settings that decide the content.")

    @property
    def layout(self) -> BlockLayout:
        """The arithmetic of this data set's shards."""
        return BlockLayout(self.block_tokens, self.dtype)

    @property
    def identity(self) -> str:
        """Hex SHA-256 over everything a training run can see (the module's docstring says what that is)."""
        seen = self.model_dump(mode="json", exclude={"shards", "sources", "settings"})
        fields = {"name", "domain", "split", "blocks", "tokens", "sha256"}
        seen["shards"] = [shard.model_dump(mode="json", include=fields) for shard in self.shards]
        return _hash(seen)

    @property
    def domains(self) -> tuple[str, ...]:
        """The names of the domains, sorted."""
        return tuple(sorted({shard.domain for shard in self.shards}))

    def select(self, domain: str | None, split: str) -> tuple[Shard, ...]:
        """The shards of one domain (``None``: of all domains) and one split, in name order.

        Raises:
            UserError: no shard fits; names the domains and splits that exist.
        """
        chosen = tuple(shard for shard in self.shards if domain in (None, shard.domain) and shard.split == split)
        if not chosen:
            known = sorted({f"{shard.domain}/{shard.split}" for shard in self.shards})
            wanted = f"{domain or 'any domain'}/{split}"
            raise UserError(f"the data set has no shard of {wanted}. It holds (domain/split): {', '.join(known)}.")
        return chosen


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Publish ``manifest.json``, identity and checksum included: the last step of a prepare."""
    content: dict[str, Any] = {**manifest.model_dump(mode="json"), "identity": manifest.identity}
    publish_json(folder / MANIFEST_FILE, {**content, "checksum": _hash(content)})


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json`` of the data set ``folder``.

    Raises:
        UserError: the folder or the file is missing, or the format version is another.
        DataError: the file is damaged, or its identity is not the one its content gives.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        what = "holds no manifest.json" if folder.is_dir() else "does not exist"
        raise UserError(
            f"data set folder {folder} {what}. Give the folder that `pretrain-data prepare` wrote; "
            "if that command was interrupted, run it again: it continues."
        )
    advice = "Restore it from a copy, or prepare the data set again in a new folder."
    try:
        content = json.loads(path.read_bytes())
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
    manifest = build_settings(Manifest, content, str(path))
    if manifest.identity != identity:
        raise DataError(f"{path}: the root hash {identity} is not that of its content, {manifest.identity}. {advice}")
    return manifest


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
