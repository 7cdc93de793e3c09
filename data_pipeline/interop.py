"""Index files that let other libraries read a data set's shards; the shards themselves stay as they are.

Plain ``webdataset`` and GNU tar need none of this: a shard is a USTAR archive of ``.npy`` files. Two readers want an
index besides, which hangs on the manifest alone, because the stride of a shard's members is constant:

- ``energon`` (megatron-energon): ``shards/NAME.tar.idx`` with the byte offset of each sample and of the end of the
  last one, raw little-endian u64; ``.nv-meta/`` with the samples of every shard, the split (our held-out text is its
  ``val``) and how to load it (a ``CrudeWebdataset``: a cooker finds a block's tokens under ``npy``).
- ``wids``: ``wids-train.json`` and ``wids-heldout.json``, to be given to ``wids.ShardListDataset``.

A sample is a block: ``block_tokens + 1`` tokens, the last of them the first of the next block.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UserError
from .files import publish_bytes
from .layout import SHARD_FOLDER, shard_path
from .manifest import HELDOUT, SPLITS, TRAIN, Manifest, read_manifest

ENERGON_FOLDER = ".nv-meta"
ENERGON_INDEX_SUFFIX = ".tar.idx"

_ENERGON_SPLITS = {TRAIN: "train", HELDOUT: "val"}


def write_index(dataset: Path, form: str) -> list[Path]:
    """Write the index files of ``form`` (``"energon"`` or ``"wids"``) into the data set folder ``dataset``.

    Written again, they get the same bytes: they hang on the manifest alone.

    Returns:
        The files, in the order in which they were written.

    Raises:
        UserError: no such form, or ``dataset`` is no local data set.
        DataError: its manifest is damaged.
        OSError: the disk.
    """
    _check_form(form)
    written = []
    for name, content in index_files(read_manifest(dataset), form):
        path = dataset / name
        path.parent.mkdir(exist_ok=True)
        publish_bytes(path, content)
        written.append(path)
    return written


def index_files(manifest: Manifest, form: str) -> Iterator[tuple[str, bytes]]:
    """The files of one form: their names inside the data set's folder and their content.

    Raises:
        UserError: no such form.
    """
    _check_form(form)
    return FORMS[form](manifest)


def energon_index(manifest: Manifest, blocks: int) -> bytes:
    """A ``.tar.idx``: where each of a shard's ``blocks`` members begins and the last one ends; little-endian u64."""
    offsets = np.arange(blocks + 1, dtype="<u8") * np.uint64(manifest.layout.member_stride)
    return offsets.astype("<u8", copy=False).tobytes()


def _energon(manifest: Manifest) -> Iterator[tuple[str, bytes]]:
    shards = manifest.shards
    blocks: list[int] = shards.blocks.tolist()
    for name, count in zip(shards.names, blocks, strict=True):
        yield f"{SHARD_FOLDER}/{name}{ENERGON_INDEX_SUFFIX}", energon_index(manifest, count)
    files = [_archive(name) for name in shards.names]
    yield f"{ENERGON_FOLDER}/.info.json", _json({"shard_counts": dict(zip(files, blocks, strict=True))})
    parts = {part: [_archive(name) for name in _names(manifest, split)] for split, part in _ENERGON_SPLITS.items()}
    # JSON is YAML, and needs no second way of writing
    yield f"{ENERGON_FOLDER}/split.yaml", _json({"split_parts": parts, "exclude": []})
    yield f"{ENERGON_FOLDER}/dataset.yaml", b"__module__: megatron.energon\n__class__: CrudeWebdataset\n"


def _wids(manifest: Manifest) -> Iterator[tuple[str, bytes]]:
    shards = manifest.shards
    rows = zip(shards.names, shards.blocks.tolist(), shards.bytes.tolist(), strict=True)
    described = {
        name: {"url": _archive(name), "nsamples": blocks, "filesize": size, "dataset": manifest.identity[:12]}
        for name, blocks, size in rows
    }
    for split in SPLITS:
        if names := _names(manifest, split):
            shardlist = [described[name] for name in names]
            content = {"wids_version": 1, "name": f"{manifest.identity[:12]}-{split}", "shardlist": shardlist}
            yield f"wids-{split}.json", _json(content)


FORMS: dict[str, Callable[[Manifest], Iterator[tuple[str, bytes]]]] = {"energon": _energon, "wids": _wids}
"""The forms :func:`write_index` knows."""


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise UserError(f"there is no index form {form!r}. Ask for one of: {', '.join(sorted(FORMS))}.")


def _archive(name: str) -> str:
    return shard_path(Path(), name).as_posix()


def _names(manifest: Manifest, split: str) -> list[str]:
    """The names of a split's shards, all domains together."""
    return manifest.shards.take(manifest.shards.split_codes == SPLITS.index(split)).names


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
