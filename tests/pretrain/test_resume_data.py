"""What a resume says to other data: refused with the difference, or accepted by name and recorded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import UserError
from data_pipeline.files import publish_json
from data_pipeline.testing import write_token_dataset
from pretrain.config import Config
from pretrain.data import open_data
from pretrain.distributed import Distributed
from pretrain.state import TrainState, checkpoint_state, end_position, resume_state

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
    return resume_state(path, settings, open_data(settings), ALONE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": {"name": "x", "seed": 8}}, "the seed was 7 and is now 8"),
        ({"data": {"order": "windowed"}}, "the order's mode was full and is now windowed"),
        ({"data": {"phases": [{"start": 20, "weights": {"a": 1, "b": 3}}]}}, "the mixture's phases started at"),
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


def test_settings_of_ranges_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data: the skipped range \(5, 5\) holds no positions"):
        tiny_config(data={"skip_ranges": [[5, 5]], "seq_len": 16, "sources": {"a": {"path": "x"}}})
