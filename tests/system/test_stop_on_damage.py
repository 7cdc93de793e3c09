"""``data.on_damage: stop`` saves what is done before the run ends, whichever rank meets the damage, and wherever."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data_pipeline.manifest import read_manifest
from data_pipeline.stream import open_stream
from pretrain.config import load_config
from pretrain.monitor import read_attempts
from tests.marks import campaign
from tests.ranks import run_on_ranks

from .runs import Runs
from .sessions import Ended, kept, meet, read, train_here

STEPS, BATCH, MICRO_BATCH = 9, 8, 2
Place = tuple[Path, int]
"""A shard, and a byte of it."""


def train_over_damage(config: Path, places: list[Place]) -> list[Ended]:
    """The run, stopped by damage at each place in turn, which is then mended, to its end; and one without damage.

    The same on every rank.
    """
    ranks, ended = meet(), []

    def turn_a_bit(shard: Path, byte: int) -> None:
        if ranks.rank == 0:
            content = bytearray(shard.read_bytes())
            content[byte] ^= 1
            shard.write_bytes(content)
        ranks.barrier()

    for place in places:
        turn_a_bit(*place)
        ended.append(train_here(ranks, config))
        turn_a_bit(*place)
    return [*ended, train_here(ranks, config), train_here(ranks, config, "run.name=straight")]


def met_by_rank_1(config: Path, step: int) -> Place:
    """A byte of a block of domain a that ``step`` reads first, on rank 1 alone."""
    settings = load_config(config)
    stream = open_stream(settings.data, settings.run.seed)
    located, a = stream.order.locate(0, step * BATCH), stream.names.index("a")
    blocks = [
        stream.sources[a].place(int(sequence)).block if source == a else None
        for source, sequence in zip(located.source, located.sequence, strict=True)
    ]
    first = (step - 1) * BATCH
    of_rank_1 = [row for row in range(BATCH) if row // MICRO_BATCH % 2 == 1]
    (block, *_) = (
        block
        for row in of_rank_1
        if (block := blocks[first + row]) is not None
        and all(position - first in of_rank_1 for position, other in enumerate(blocks) if other == block)
    )
    return place(Path(settings.data.sources["a"].path), "train", block)


def place(data: Path, split: str, block: int) -> Place:
    manifest = read_manifest(data)
    (shard,) = manifest.select("a", split)
    return data / "shards" / f"{shard.name}.tar", manifest.layout.data_offset(block) + 5


@pytest.mark.parametrize(
    ("stage", "asynchronous"), [(3, True), *(campaign(stage, way) for stage in range(4) for way in (False, True))]
)
def test_steps_before_damage_are_saved_and_the_mended_run_is_the_straight_one(
    runs: Runs, tmp_path: Path, stage: int, asynchronous: bool
) -> None:
    """Damage in the first step, in held-out data after step 5, and in step 7; saves are due every 4 steps."""
    data = tmp_path / "copy"
    shutil.copytree(runs.data, data)
    own = Runs(tmp_path, data)
    config = own.config(
        "run",
        training={"steps": STEPS},
        engine={"zero_stage": stage},
        checkpoint={"every_steps": 4, "asynchronous": asynchronous, "keep_last": 9},
        evaluation={"every_steps": 5},
    )
    places = [met_by_rank_1(config, 1), place(data, "heldout", 1), met_by_rank_1(config, 7)]
    told = run_on_ranks(train_over_damage, 2, config, places)
    assert told[0] == told[1], "the ranks agree on how the run ends"
    *stopped, done, straight = told[0]
    names = [f"step_{step:09d}" for step in (4, 5, 6, 8, 9)]
    for ended, (shard, _), there in zip(stopped, places, (0, 2, 3), strict=True):
        assert ended.code == 2
        assert ended.why.startswith("rank 1 on ")
        assert f"{shard}" in ended.why
        assert "CRC32C" in ended.why
        assert "rank 0 on" not in ended.why
        assert ended.checkpoints == names[:there]
        assert ("is saved at step" in ended.why) == (there > 0)
    assert done == Ended(0, "", names)
    assert straight.code == 0
    attempts = read_attempts(own.run_folder("run"))
    assert [(each.reason, each.exit_code, each.last_step) for each in attempts] == [
        ("user_error", 2, 0), ("user_error", 2, 5), ("user_error", 2, 6), ("done", 0, STEPS)
    ]  # fmt: skip
    assert [each.message for each in attempts[:3]] == [ended.why for ended in stopped]
    assert kept(own.run_folder("run")) == kept(own.run_folder("straight"))
    assert own.metrics("run") == own.metrics("straight")
    assert read(own.run_folder("run"), STEPS) == read(own.run_folder("straight"), STEPS)
