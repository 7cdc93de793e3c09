"""What a session records of its end."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO, cast

import pytest

from pretrain.distributed import Distributed
from pretrain.monitor import AttemptsLog, read_attempts
from pretrain.run import Session
from pretrain.terminal import LastingOutput


def test_a_closed_pipe_does_not_keep_the_reason_from_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of ``pretrain train ... 2>&1 | tee log`` where ``tee`` has died."""
    ranks = cast(Distributed, SimpleNamespace(rank=0, world_size=1))
    session = Session(ranks)
    session._folder = tmp_path
    session._attempt = AttemptsLog(tmp_path).start(
        hosts=["h"], world_size=1, versions={}, first_step=1, resumed_from=None
    )

    def broken(text: str) -> int:
        raise BrokenPipeError("Broken pipe")

    with monkeypatch.context() as patched:
        closed = cast(TextIO, SimpleNamespace(write=broken, flush=lambda: broken("")))
        patched.setattr(sys, "stderr", LastingOutput(closed))  # as run_training lets it be
        assert session.end("crash", 1, BrokenPipeError("Broken pipe")) == 1
    (told,) = read_attempts(tmp_path)
    assert (told.reason, told.message) == ("crash", "Broken pipe")
