"""What a run loses by missing shards is known before it begins: counted as the order would meet them, or refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from data_pipeline.errors import DataError, UserError
from data_pipeline.testing import write_token_dataset
from pretrain import missing
from pretrain.agreement import AgreedError
from pretrain.config import load_config
from pretrain.data import open_data
from pretrain.plan import make_plan, show_plan
from pretrain.run import Session
from pretrain.state import TrainState

from .test_resume_data import ALONE

SKIPPED = [[16, 40], [200, 400]]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of 100 steps of 8 sequences; the data set has several shards of each domain; one of a's lost its file, one
    its block index, and a held-out one of b's its file."""
    random = np.random.default_rng(1)
    groups = {
        (domain, split): [random.integers(5, 60, 40).tolist() for _ in range(count)]
        for split, count in (("train", 120), ("heldout", 8))
        for domain in "ab"
    }
    write_token_dataset(tmp_path / "data", groups, block_tokens=64, documents_per_shard=30)
    source = {"path": str(tmp_path / "data"), "max_epochs": None}
    content: dict[str, Any] = {
        "run": {"name": "run", "folder": str(tmp_path / "runs")},
        "data": {
            "seq_len": 32,
            "sources": {name: {**source, "domain": name} for name in "ab"},
            "on_damage": "hole",
            "max_hole_fraction": 0.5,
            "skip_ranges": SKIPPED,
        },
        "model": {"hidden_size": 32, "layers": 1, "heads": 4, "intermediate_size": 48},
        "training": {"steps": 100, "global_batch": 8, "micro_batch": 2, "precision": "fp32"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    for place in lost(path):
        os.remove(place)
    return path


def lost(config: Path) -> list[str]:
    """The second shard of domain a, the block index of the third, the first held-out one of b."""
    data = open_data(load_config(config))
    return [data.sources[0].where(1), data.sources[0].where(2).replace(".tar", ".idx"), data.heldout["b"].where(0)]


def expected(config: Path, position: int = 0) -> int:
    """How many positions that are read hold a sequence of these shards, one by one."""
    settings = load_config(config)
    data = open_data(settings)
    located, names = data.order.locate(0, settings.batch_plan.start_of(100)), data.sources[0].shards.names
    return sum(
        source == 0
        and data.sources[0].place(int(sequence)).shard in names[1:3]
        and place >= position
        and not any(start <= place < stop for start, stop in SKIPPED)
        for place, (source, sequence) in enumerate(zip(located.source, located.sequence, strict=True))
    )


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_plan_counts_what_is_missing_or_refuses_it(config: Path, ranks: int) -> None:
    holes = expected(config)
    assert 50 < holes < 400, "more than an epoch's, or nothing is tested"
    plan = make_plan(config, [], ranks)
    assert plan["missing"] == {"shards": 2, "heldout_shards": 1, "holes": holes, "exact": True}
    told = f"2 shards are missing or without block index, by which the run loses {holes} sequences"
    told += "; of the held-out shards 1"
    assert f"missing       {told}\n" in show_plan(plan)
    assert make_plan(config, [f"data.max_hole_fraction={holes / 800}"], ranks)["missing"]["holes"] == holes
    with pytest.raises(
        UserError, match=rf"{told} \(the first: .*\); data.max_hole_fraction = .* allows {holes - 1} in"
    ):
        make_plan(config, [f"data.max_hole_fraction={(holes - 1) / 800}"], ranks)
    stop = ["data.on_damage=stop", "data.max_hole_fraction=0.001"]
    with pytest.raises(DataError, match=r"data.sources.[ab]: shard .* is missing: .* sequences are lost\.$"):
        make_plan(config, stop, ranks)
    with pytest.raises(DataError, match=r"data.sources.a: shard .* is missing: .*; the block index .*\.idx is missing"):
        make_plan(config, [*stop, "evaluation.every_steps=null"], ranks)


def test_only_what_lies_ahead_counts_and_what_is_many_is_not_counted_to_the_last(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_config(config)
    data = open_data(settings)
    shards, end = [source.unreadable_shards() for source in data.sources], settings.batch_plan.start_of(100)
    assert [rows.tolist() for rows in shards] == [[1, 2], []]
    found = missing.look_for_missing(settings, data, shards, 1, 7, 20, end)
    assert found == missing.Missing(2, 1, expected(config, 20), True)
    with pytest.raises(UserError, match=r"it has 399 holes already, and data\.max_hole_fraction"):
        missing.look_for_missing(settings, data, shards, 1, 399, 20, end)
    monkeypatch.setattr(missing, "MOST_LOOKED_AT", 1)
    some = missing.look_for_missing(settings, data, shards, 0, 0, 0, end)
    assert not some.exact
    assert 0 < some.holes < expected(config)
    assert missing.told(some).startswith(
        "2 shards are missing or without block index, by which the run loses at least "
    )


def test_a_start_refuses_it_too(config: Path) -> None:
    session, data = Session(ALONE), open_data(load_config(config))
    session._tell_missing(load_config(config), data, TrainState())
    with pytest.raises(AgreedError, match="allows 80 in all"):
        session._tell_missing(load_config(config, ["data.max_hole_fraction=0.1"]), data, TrainState())
