"""webdataset: on our tars, as anybody would read them, and on open_lm's format (a JSON list a sample, gzipped)."""

from __future__ import annotations

import gzip
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import webdataset

from .rows import batch_of, split

VERSION = webdataset.__version__
SKIP = 0

_BUFFER = 1000
_SAMPLES_PER_TAR = 1024
_NPY_HEADER = 128

Sample = dict[str, Any]
Batch = tuple[torch.Tensor, torch.Tensor]
Epoch = Callable[[int], Iterator[Batch]]


def write(rows: npt.NDArray[np.uint16], folder: Path) -> None:
    """Tars of ``.json.gz`` samples, one sequence each."""
    for first in range(0, len(rows), _SAMPLES_PER_TAR):
        with tarfile.open(folder / f"{first // _SAMPLES_PER_TAR:06d}.tar", "w") as archive:
            for number, row in enumerate(rows[first : first + _SAMPLES_PER_TAR], first):
                content = gzip.compress(json.dumps(row.tolist()).encode())
                info = tarfile.TarInfo(f"{number:08d}.json.gz")
                info.size = len(content)
                archive.addfile(info, BytesIO(content))


def _shards(folder: Path, number: int) -> webdataset.WebDataset:
    """All shards in shuffled order, as the library's documentation asks for in training."""
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    return webdataset.WebDataset(urls, shardshuffle=len(urls), detshuffle=True, seed=number)


def _blocks(decode: bool, folder: Path, batch: int, seq_len: int) -> Epoch:
    """Our tars: blocks of 65,536 tokens and one more, cut into sequences, shuffled in a buffer."""

    def cut(samples: Iterable[Sample]) -> Iterator[npt.NDArray[np.uint16]]:
        for sample in samples:
            tokens = sample["npy"] if decode else np.frombuffer(sample["npy"], "<u2", offset=_NPY_HEADER)
            for start in range(0, len(tokens) - 1, seq_len):
                yield tokens[start : start + seq_len + 1]

    def epoch(number: int) -> Iterator[Batch]:
        shards = _shards(folder, number)
        decoded = shards.decode() if decode else shards
        return iter(decoded.compose(cut).shuffle(_BUFFER).batched(batch, collation_fn=batch_of))

    return epoch


def _json(folder: Path, batch: int, seq_len: int) -> Epoch:
    def collate(samples: list[Sample]) -> Batch:
        return split(torch.tensor([sample["json.gz"] for sample in samples]))

    def epoch(number: int) -> Iterator[Batch]:
        return iter(_shards(folder, number).decode().shuffle(_BUFFER).batched(batch, collation_fn=collate))

    return epoch


VARIANTS = {
    "blocks": partial(_blocks, True),
    "blocks_frombuffer": partial(_blocks, False),
    "json_gz": _json,
}
