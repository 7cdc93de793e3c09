"""What a resume says to other data: refused with the difference, or accepted by name and recorded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.errors import UserError
from data_pipeline.files import publish_json
from data_pipeline.testing import write_token_dataset
from pretrain.beginning import open_beginning
from pretrain.check import check_run
from pretrain.config import Config
from pretrain.data import open_data
from pretrain.distributed import Distributed
from pretrain.state import TrainState, checkpoint_state, config_changes, end_position, resume_state

from .steps import tiny_config

ALONE = Distributed(0, 1, torch.device("cpu"))
STATE = TrainState(step=2, position=16)


def config(folder: Path, **sections: dict[str, Any]) -> Config:
    data = {
        "seq_len": 16,
        "sources": {name: {"path": str(folder), "domain": name, "max_epochs": None} for name in "ab"},
        **sections.pop("data", {}),
    }
    model = {**tiny_config().model.model_dump(), "vocab_size": None}
    return tiny_config(data=data, model=model, evaluation={"every_steps": None}, **sections)


def write(folder: Path, first: int = 5) -> Path:
    documents = {("a", "train"): [[first] * 100], ("b", "train"): [[7] * 200]}
    write_token_dataset(folder, documents, block_tokens=64)
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path]:
    """A data set, and the state.json of a checkpoint after two steps of eight."""
    folder = write(tmp_path / "data")
    save(tmp_path / "checkpoint", config(folder))
    return folder, tmp_path / "checkpoint"


def save(path: Path, settings: Config, state: TrainState = STATE) -> None:
    path.mkdir(exist_ok=True)
    publish_json(path / "state.json", checkpoint_state(state, settings, open_data(settings), ALONE))


def resume(path: Path, settings: Config) -> TrainState:
    return resume_state(path, settings, open_data(settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": {"name": "x", "seed": 8}}, "the seed was 7 and is now 8"),
        ({"data": {"order": "windowed"}}, "the order's mode was full and is now windowed"),
        ({"data": {"phases": [{"start": 15, "weights": {"a": 1, "b": 3}}]}}, "the mixture's phases started at"),
        ({"data": {"seq_len": 32}}, "seq_len: 16 in the checkpoint, 32 now"),
    ],
)
def test_another_order_is_refused_or_accepted_by_its_code(
    saved: tuple[Path, Path], changes: dict[str, Any], message: str
) -> None:
    folder, checkpoint = saved
    with pytest.raises(UserError) as refusal:
        resume(checkpoint, config(folder, **changes))
    assert message in str(refusal.value)
    (code,) = re.findall(r"data\.accept_change=([0-9a-f]{12})", str(refusal.value))
    assert not code[0].isdecimal(), "one code in 300 would be a number on the command line"
    accepting = {**changes, "data": {**changes.get("data", {}), "accept_change": code}}
    state = resume(checkpoint, config(folder, **accepting))
    assert (state.step, state.position) == (2, 16)
    (change,) = state.data_changes
    assert change.startswith("from step 3 on: ")
    assert message in change


def test_another_data_set_is_refused_and_a_code_holds_for_one_change_only(
    saved: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, checkpoint = saved
    codes = []
    for first in (6, 9):
        other = write(tmp_path / f"other{first}", first)
        with pytest.raises(UserError, match="data_sets: ") as refusal:
            resume(checkpoint, config(other))
        codes += re.findall(r"accept_change=([0-9a-f]{12})", str(refusal.value))
    assert len(set(codes)) == 2
    other = config(tmp_path / "other9", data={"accept_change": codes[0]})
    with pytest.raises(UserError, match="can't be resumed"):
        resume(checkpoint, other)
    accepted = config(tmp_path / "other9", data={"accept_change": codes[1]})
    state = resume(checkpoint, accepted)
    save(tmp_path / "next", accepted, state)
    again = resume(tmp_path / "next", config(tmp_path / "other9"))
    assert again.data_changes == state.data_changes, "the record goes on, and nothing is accepted twice"
    assert resume(checkpoint, config(folder)).data_changes == ()


def test_phases_may_change_only_ahead(saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder, checkpoint = saved

    def phased(*phases: tuple[int, int]) -> Config:
        return config(folder, data={"phases": [{"start": start, "weights": {"a": 1, "b": b}} for start, b in phases]})

    save(tmp_path / "phased", phased((9, 2), (16, 3), (20, 5)))
    for ahead in (phased((9, 2)), phased((9, 2), (17, 1)), phased((9, 2), (16, 3), (20, 6))):
        assert resume(tmp_path / "phased", ahead).data_changes == ()
        located = [open_data(each).order.locate(0, 16) for each in (phased((9, 2), (16, 3), (20, 5)), ahead)]
        assert all(np.array_equal(one, other) for one, other in zip(*located, strict=True))
    assert resume(checkpoint, phased((16, 3))).position == 16
    for before in (phased((9, 3), (16, 3)), phased((8, 2)), phased((9, 2), (15, 2)), config(folder)):
        with pytest.raises(UserError, match="the order of the data differs"):
            resume(tmp_path / "phased", before)


def test_a_code_of_no_change_is_refused(saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder, checkpoint = saved
    with pytest.raises(UserError, match=r"data.accept_change = 'bogus' is the code of no change that .* Take it away"):
        resume(checkpoint, config(folder, data={"accept_change": "bogus"}))
    used = config(folder, data={"accept_change": "c0"})
    save(tmp_path / "used", used)
    assert resume(tmp_path / "used", used).data_changes == (), "it was accepted before this checkpoint"


def test_what_is_another_setting_now_is_listed(saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder, checkpoint = saved
    other = config(folder, run={"name": "other", "seed": 8}, data={"prefetch": 1})
    assert config_changes(checkpoint, other) == ["data.prefetch: 4 -> 1", "run.seed: 7 -> 8"]


def test_skipped_ranges_may_change_only_ahead(saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder, checkpoint = saved
    assert resume(checkpoint, config(folder, data={"skip_ranges": [[16, 20]]})).position == 16
    with pytest.raises(UserError, match=r"before its position 16 the positions none were left out, and .* \[10, 16\)"):
        resume(checkpoint, config(folder, data={"skip_ranges": [[10, 20]]}))
    skipping = config(folder, data={"skip_ranges": [[4, 6], [18, 24]]})
    state = TrainState(step=2, position=18)
    save(tmp_path / "skipping", skipping, state)
    assert resume(tmp_path / "skipping", skipping).position == 18
    with pytest.raises(UserError, match=r"the positions \[4, 6\) were left out, and data.skip_ranges leaves out none"):
        resume(tmp_path / "skipping", config(folder))
    assert end_position(skipping, state) == 18 + 8 + 6, "one step of eight is left, over a range of six"


def test_whether_the_data_lasts_is_asked_from_where_the_run_stands(tmp_path: Path) -> None:
    """Two steps of two sequences were taken before the batch became eight: 12 sequences to the end, not 24. A source
    has 7 and 13 sequences."""
    folder = write(tmp_path / "data")
    sources = {name: {"path": str(folder), "domain": name} for name in "ab"}
    settings = config(folder, data={"sources": sources})
    save(tmp_path / "checkpoint", settings, TrainState(step=2, position=4))
    state = resume(tmp_path / "checkpoint", settings)
    assert (state.position, end_position(settings, state)) == (4, 12)
    with pytest.raises(UserError, match=r"source 'a' runs out at position \d+: it has 7 sequences"):
        open_beginning(settings, open_data(settings))
    save(tmp_path / "checkpoint", settings, TrainState(step=2, position=16))
    with pytest.raises(UserError, match=r"source 'a' runs out at position"):
        resume(tmp_path / "checkpoint", settings)


def test_phases_and_ranges_lie_before_the_end_from_where_the_run_stands(tmp_path: Path) -> None:
    """Two steps of eight were taken before the batch became one: the end is at 17, not at 3."""
    folder = write(tmp_path / "data")
    phases = {"phases": [{"start": 16, "weights": {"a": 0.5, "b": 1.0}}]}
    for late, told in ((phases, r"the phase at position 16"), ({"skip_ranges": [[16, 20]]}, r"range \(16, 20\)")):
        settings = config(folder, data=late, training={"global_batch": 1})
        save(tmp_path / "checkpoint", settings)
        assert resume(tmp_path / "checkpoint", settings).position == 16
        with pytest.raises(UserError, match=rf"{told} begins after the run's end at (position )?3"):
            open_beginning(settings, check_run(settings, 1))


def test_settings_of_ranges_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data: the skipped range \(5, 5\) holds no positions"):
        tiny_config(data={"skip_ranges": [[5, 5]], "seq_len": 16, "sources": {"a": {"path": "x"}}})
