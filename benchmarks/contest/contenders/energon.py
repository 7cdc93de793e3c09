"""megatron-energon: tars of one sequence a sample, indexed by its own `energon prepare`, shuffled as for training."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import megatron.energon
import numpy as np
import numpy.typing as npt
import torch
from megatron.energon import Cooker, DefaultTaskEncoder, Sample, WorkerConfig, basic_sample_keys, edataclass, stateless

from .rows import batch_of

VERSION = megatron.energon.__version__
SKIP = 0

_BUFFER = 1000
_SAMPLES_PER_TAR = 1024
_SAMPLES_PER_SLICE = 100
_NPY_HEADER = 128

Batch = tuple[torch.Tensor, torch.Tensor]
Epoch = Callable[[int], Iterator[Batch]]


def write(rows: npt.NDArray[np.uint16], folder: Path) -> None:
    """Tars of ``.npy`` samples and energon's own index of them."""
    for first in range(0, len(rows), _SAMPLES_PER_TAR):
        with tarfile.open(folder / f"{first // _SAMPLES_PER_TAR:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for number, row in enumerate(rows[first : first + _SAMPLES_PER_TAR], first):
                content = BytesIO()
                np.save(content, row)
                info = tarfile.TarInfo(f"{number:08d}.npy")
                info.size = content.tell()
                content.seek(0)
                archive.addfile(info, content)
    command = [Path(sys.executable).with_name("energon"), "prepare", folder, "--non-interactive", "--no-progress"]
    command += ["--split-parts", "train:.*", "--sample-type", "CrudeWebdataset", "--num-workers", "1"]
    subprocess.run(command, check=True, stdout=sys.stderr)


@edataclass
class Sequence(Sample):
    tokens: np.ndarray


@stateless
def _cook_decoded(sample: dict[str, Any]) -> Sequence:
    return Sequence(**basic_sample_keys(sample), tokens=sample["npy"])


@stateless
def _cook_bytes(sample: dict[str, Any]) -> Sequence:
    return Sequence(**basic_sample_keys(sample), tokens=np.frombuffer(sample["npy"], "<u2", offset=_NPY_HEADER))


class _Decoding(DefaultTaskEncoder[Sequence, Sequence, Batch, Batch]):
    cookers = [Cooker(_cook_decoded)]  # noqa: RUF012 - energon's way

    @stateless
    def batch(self, samples: list[Sequence]) -> Batch:
        return batch_of([sample.tokens for sample in samples])

    @stateless
    def encode_batch(self, batch: Batch) -> Batch:
        return batch


class _Bytes(_Decoding):
    """Leaves out energon's decoder, which tries every handler on every sample."""

    decoder = None
    cookers = [Cooker(_cook_bytes)]  # noqa: RUF012 - energon's way


def _open(encoder: type[_Decoding], folder: Path, batch: int, seq_len: int) -> Epoch:
    """Goes on for ever, as it would in training; what is called an epoch here is as many batches as one has.

    Its garbage collection every few batches, which takes most of the time of batches as small as these, is off.
    """
    dataset = megatron.energon.get_train_dataset(
        folder,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=batch,
        shuffle_buffer_size=_BUFFER,
        max_samples_per_sequence=_SAMPLES_PER_SLICE,
        task_encoder=encoder(),
    )
    batches = iter(megatron.energon.get_savable_loader(dataset, gc_collect_every_n_steps=0))
    return lambda number: islice(batches, len(dataset))


VARIANTS = {"npy": partial(_open, _Decoding), "npy_frombuffer": partial(_open, _Bytes)}
