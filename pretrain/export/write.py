"""Tensors into safetensors files, and a folder that is complete or invisible (law 4)."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data_pipeline.errors import HeadraceError, UserError
from data_pipeline.files import fsync_folder

from .libraries import needed

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_WRITING = ".exporting_"


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written: known by shape and type before it is made."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    """The tensor in this shape; its type is converted when it is written."""


@contextmanager
def published(output: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``output`` when the body has ended without an error.

    What an earlier attempt that was killed has left beside it is removed.

    Raises:
        UserError: ``output`` exists and is not an empty folder, can't be made, or another export is writing it.
        HeadraceError: the disk failed.
    """
    output = output.resolve()
    _refuse_taken(output)
    draft = output.with_name(f"{_WRITING}{output.name}")
    try:
        draft.mkdir(parents=True, exist_ok=True)
        lock = os.open(draft, os.O_RDONLY)
    except OSError as error:
        raise UserError(
            f"{output} can't be made: {error.strerror} ({error.filename}). Choose another output."
        ) from error
    try:
        _lock(lock, output)
        for leftover in draft.iterdir():
            leftover.unlink()
        yield draft
        for path in draft.iterdir():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
        fsync_folder(draft)
        _refuse_taken(output)
        os.rename(draft, output)
        fsync_folder(output.parent)
    except BlockingIOError as error:
        raise UserError(f"{output} is being written by another export. Wait, or choose another output.") from error
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, OSError):
            raise HeadraceError(f"{output} could not be written: {error}. Mend the disk and export again.") from error
        raise
    finally:
        os.close(lock)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _lock(descriptor: int, output: Path) -> None:
    """Raises BlockingIOError while another process holds the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        print(f"warning: {output} lies on a file system without locks ({error.strerror})", file=sys.stderr)


def _refuse_taken(output: Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output} exists already. Choose a folder that does not exist yet, or an empty one.")


def write_tensors(folder: Path, tensors: Mapping[str, Planned], max_shard_size: str) -> int:
    """Make and write the tensors, one file after the other; with an index when there is more than one.

    No more than one file's tensors are in memory, besides what :attr:`Planned.make` reads from.

    Args:
        folder: to write into.
        tensors: by the names that they have in the files.
        max_shard_size: of a file, as ``5GB``; a tensor that is larger has a file to itself.

    Returns:
        the bytes of all tensors.

    Raises:
        UserError: ``max_shard_size`` is no size.
        OSError: of the disk.
    """
    outlines = {name: torch.empty(each.shape, dtype=each.dtype, device="meta") for name, each in tensors.items()}
    try:
        split = needed("huggingface_hub").split_torch_state_dict_into_shards(outlines, max_shard_size=max_shard_size)
    except ValueError as error:
        raise UserError(
            f"--max-shard-size {max_shard_size!r} is no size ({error}). Give one as 5GB or 500MB."
        ) from error
    files = needed("safetensors.torch")
    total = int(split.metadata["total_size"])
    with tqdm(total=total, desc="export", unit="B", unit_scale=True, disable=None) as bar:
        for file, names in split.filename_to_tensors.items():
            content = {name: tensors[name].make().to(tensors[name].dtype).contiguous() for name in names}
            try:
                files.save_file(content, folder / file, metadata={"format": "pt"})
            except needed("safetensors").SafetensorError as error:
                raise OSError(str(error)) from error  # what the library makes of an error of the disk
            (folder / file).chmod(0o666 & ~_umask())  # the library lets only the owner read
            bar.update(sum(tensor.nbytes for tensor in content.values()))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return total
