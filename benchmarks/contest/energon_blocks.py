"""Reads a data set's blocks with megatron-energon, in its environment: prints one JSON object, key -> CRC-32 of tokens.

python -m contest.energon_blocks DATASET PART
"""

from __future__ import annotations

import json
import os
import sys
import zlib

import numpy as np
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_loader,
    get_val_dataset,
    stateless,
)


@edataclass
class Block(Sample):
    tokens: np.ndarray


@stateless
def cook(sample: dict[str, object]) -> Block:
    """What energon decoded from a ``.npy`` member."""
    return Block(**basic_sample_keys(sample), tokens=sample["npy"])


class Encoder(DefaultTaskEncoder[Block, Block, list[Block], list[Block]]):
    """Batches are lists."""

    cookers = [Cooker(cook)]  # noqa: RUF012 - energon's way

    @stateless
    def batch(self, samples: list[Block]) -> list[Block]:
        return samples

    @stateless
    def encode_batch(self, batch: list[Block]) -> list[Block]:
        return batch


def main() -> None:
    """Once over all blocks of the part, in order."""
    dataset, part = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries talk
    workers = WorkerConfig(rank=0, world_size=1, num_workers=0)
    read = get_val_dataset(dataset, split_part=part, worker_config=workers, batch_size=1, task_encoder=Encoder())
    blocks = [(block.__key__, zlib.crc32(block.tokens.tobytes())) for (block,) in get_loader(read)]
    print(json.dumps(blocks), file=answers)


if __name__ == "__main__":
    main()
