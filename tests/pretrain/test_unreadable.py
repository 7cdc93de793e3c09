"""Data that a rank can't read: what all ranks raise, and what is told where the steps before can't be saved either."""

from __future__ import annotations

import errno
import re
import socket
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from data_pipeline import EvaluationLoader
from data_pipeline.damage import DamagedBlockError
from data_pipeline.errors import EXIT_CRASH, EXIT_USER_ERROR
from pretrain.checkpoint import CheckpointError
from pretrain.distributed import Distributed
from pretrain.evaluation import _batches
from pretrain.train import Trainer
from pretrain.unreadable import UnreadableDataError, agree_on_reading

HERE = socket.gethostname()
DAMAGE = DamagedBlockError("shard x is damaged.", "x", 1, 2, "checksum")
DISK = OSError(errno.EIO, "Input/output error", "/cache/x")


class Told(Distributed):
    """A rank among three, the first and last of which have something to tell."""

    def gather_objects(self, item: Any) -> list[Any]:
        return [("rank 0 on a: nothing there.", 2), None, item]


@pytest.mark.parametrize(("failure", "code"), [(DAMAGE, EXIT_USER_ERROR), (DISK, EXIT_CRASH)])
def test_the_error_has_the_code_that_it_has_on_one_rank(failure: Exception, code: int) -> None:
    alone = Distributed(0, 1, torch.device("cpu"))
    with pytest.raises(UnreadableDataError, match=f"^{re.escape(str(failure).rstrip('.'))}.$") as told:
        agree_on_reading(alone, failure)
    assert told.value.exit_code == code
    agree_on_reading(alone, None)


def test_every_rank_that_failed_is_named() -> None:
    with pytest.raises(UnreadableDataError) as told:
        agree_on_reading(Told(2, 3, torch.device("cpu")), DISK)
    assert str(told.value) == f"rank 0 on a: nothing there. rank 2 on {HERE}: {DISK}."
    assert told.value.exit_code == EXIT_USER_ERROR, "it would fail again"


def test_a_disk_that_is_full_does_not_hide_the_damage() -> None:
    def full() -> None:
        raise CheckpointError("the disk is full.")

    for saved, broken in ((4, {"save": full}), (6, {"finish_save": full})):  # the second: its save is still going on
        trainer = SimpleNamespace(guard=None, _saved_step=saved, state=SimpleNamespace(step=6), **broken)
        told = Trainer._save_before_end(cast(Trainer, trainer))
        lost = "The steps since the newest complete checkpoint could not be saved, and are lost"
        assert told == f" {lost}: the disk is full."


def test_a_rank_that_can_not_read_goes_through_as_many_batches() -> None:
    class Loader:
        read = 0

        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Any:
            for number in range(4):
                self.read += 1
                if number == 2:
                    raise DAMAGE
                yield number

        def nothing(self) -> str:
            return "nothing"

    failures: list[Exception] = []
    first, second = Loader(), Loader()
    assert [*_batches(cast(EvaluationLoader, first), failures)] == [0, 1, "nothing", "nothing"]
    assert failures == [DAMAGE]
    assert [*_batches(cast(EvaluationLoader, second), failures)] == ["nothing"] * 4
    assert (second.read, failures) == (0, [DAMAGE]), "the next source is not read any more"
