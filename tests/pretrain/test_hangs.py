"""Who waits for whom, and who is slow: in words, without a process."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from pretrain.config import ResilienceSettings
from pretrain.distributed import Distributed
from pretrain.hangs import guard
from pretrain.hangs.account import Account, account_of, guilty, verdict
from pretrain.hangs.guard import HangError, HangGuard
from pretrain.stragglers import Stragglers


class Ranks:
    """One of several ranks, the others of which say what the test lets them."""

    def __init__(self, others: list[Any]) -> None:
        self.rank, self.world_size, self.others = 0, 1 + len(others), others
        self.device = torch.device("cpu")

    def gather_objects(self, item: Any) -> list[Any]:
        return [item, *self.others]


def waiter(rank: int, collective: str | None, phase: str = "backward", alone: bool | None = None) -> Account:
    alone = collective is None if alone is None else alone
    return Account(rank, f"host{rank}", 12, phase, collective, "pretrain/train.py:7", alone)


def test_the_rank_that_all_wait_for_comes_first() -> None:
    waiting = [waiter(rank, "all_reduce") for rank in (0, 1, 3)]
    assert verdict(waiting, {2: "host2"}) == (
        "rank 2 on host2 does not answer (stopped, swapped out, or stuck below Python); "
        "ranks 0, 1, 3 wait in all_reduce (backward of step 12)"
    )
    assert verdict([*waiting, waiter(2, None, "forward")], {}) == (
        "rank 2 on host2 is in no collective, at pretrain/train.py:7 (forward of step 12); "
        "ranks 0, 1, 3 wait in all_reduce (backward of step 12)"
    )
    assert verdict([waiter(0, "barrier"), *waiting[1:]], {}).startswith("rank 0 waits in barrier")


def test_only_a_rank_that_others_certainly_wait_for_is_guilty() -> None:
    waiting = [waiter(rank, "all_reduce") for rank in (0, 1)]
    assert guilty(waiting, [3, 2]) == (2, 3)
    assert guilty([*waiting, waiter(2, None)], []) == (2,)
    assert guilty([*waiting, waiter(2, None)], [3]) == (3,), "the other may only look as if it were busy"
    assert guilty([*waiting, waiter(2, None, alone=False)], []) == (), "it waits for its device, and so for a rank"
    assert guilty(waiting, []) == (), "two collectives that do not fit are nobody's hardware"
    assert guilty([waiter(0, None, "waiting for data"), waiter(1, None, "waiting for data")], []) == ()
    assert guilty([waiter(0, None)], [1, 2]) == (), "whom all others are missing to may be cut off himself"


def test_a_process_says_where_it_stands() -> None:
    def told(name: str, file: str = __file__, on_device: bool = False) -> Account:
        """Of a main thread that is in the function ``name`` of ``file``."""
        found: list[Account] = []
        thread = threading.Thread(target=lambda: found.append(account_of(3, "here", 5, on_device)))
        program = f"def {name}(thread):\n    thread.start()\n    thread.join()"
        functions: dict[str, Any] = {}
        exec(compile(program, file, "exec"), functions)
        functions[name](thread)
        return found[0]

    forward = told("training_forward")
    assert (forward.rank, forward.phase, forward.collective, forward.alone) == (3, "forward", None, True)
    assert "tests/pretrain/test_hangs.py" in forward.place
    assert not told("training_forward", on_device=True).alone
    assert told("next_step_unless", on_device=True).alone
    reduction = told("all_reduce", "/x/torch/distributed/distributed_c10d.py")
    assert (reduction.collective, reduction.alone) == ("all_reduce", False)
    begun_before = told("wait", "/x/deepspeed/runtime/zero/partition_parameters.py")
    assert (begun_before.collective, begun_before.alone) == ("the wait for a collective", False)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(guard.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    return now


def test_how_long_a_step_may_take(clock: list[float], tmp_path: Path) -> None:
    settings = ResilienceSettings(hang_multiple=10, hang_seconds=30)
    watch = HangGuard(settings, tmp_path, cast(Distributed, Ranks([])), lambda error: None)
    for step in range(1, 5):
        assert watch.limit() is None or step > guard.FEWEST_STEPS
        watch.begin_step(step)
        clock[0] += 2.0
    watch.pause()
    assert watch.limit() == 30
    for step in range(5, 15):
        watch.begin_step(step)
        clock[0] += 7.0
    watch.pause()
    clock[0] += 1000.0  # of a save
    watch.begin_step(15)
    assert watch.limit() == 70
    assert (
        HangGuard(
            ResilienceSettings(hang_multiple=None), tmp_path, cast(Distributed, Ranks([])), lambda error: None
        ).limit()
        is None
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_giving_up_leaves_stacks_and_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step never ends: the rank tells it, the silent one of this host is killed, and the process ends."""
    ended: list[HangError] = []
    over, signals = threading.Event(), []
    monkeypatch.setattr(guard, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(guard, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(guard, "STACK_SECONDS", 0.0)
    monkeypatch.setattr(guard.socket, "gethostname", lambda: "here")
    monkeypatch.setattr(guard.os, "kill", lambda pid, number: signals.append((pid, number.name)))

    def leave(code: int) -> None:
        assert code == 1
        over.set()
        raise SystemExit  # of this thread alone: it must not go on when the test is over

    monkeypatch.setattr(guard.os, "_exit", leave)
    ranks = Ranks([("here", 71), ("there", 72)])
    settings = ResilienceSettings(hang_multiple=2, hang_seconds=0.05)
    watch = HangGuard(settings, tmp_path / "hangs", cast(Distributed, ranks), ended.append)
    for step in range(1, 6):
        watch.begin_step(step)
    assert over.wait(30)
    for thread in threading.enumerate():
        if thread.name == "hang-guard":
            thread.join(30)
    assert signals == [(71, "SIGUSR2"), (71, "SIGKILL")]
    assert "rank 1 on here does not answer" in str(ended[0])
    assert "rank 2 on there does not answer" in str(ended[0])
    assert "rank 0 on here is in no collective" in str(ended[0])
    assert ended[0].guilty == ()
    assert "test_hangs.py" in (tmp_path / "hangs" / "rank_00000.txt").read_text()
    assert (tmp_path / "hangs" / "rank_00000.json").exists()


def stragglers(others: list[list[float]], forward_alone: bool = True) -> list[str]:
    ranks = Ranks([(f"host{number}", each) for number, each in enumerate(others, start=1)])
    found = Stragglers(ResilienceSettings(straggler_every=2), cast(Distributed, ranks), forward_alone)
    assert found.add(1, 0.1, 0.0) == []
    return [str(event["message"]) for event in found.add(2, 0.3, 0.0)]  # a mean of 0.2 s


def test_a_slow_rank_is_named() -> None:
    assert stragglers([[0.2, 0.0], [0.29, 0.0]]) == []
    assert stragglers([[0.2, 0.0], [0.31, 0.0]]) == [
        "rank 2 on host2: forward pass takes 0.31 s, the ranks' median 0.2 s"
    ]
    assert stragglers([[0.9, 0.0]]) == ["rank 1 on host1: forward pass takes 0.9 s, the ranks' median 0.2 s"]
    assert stragglers([[0.9, 0.05], [0.2, 0.0]], forward_alone=False) == [
        "rank 1 on host1: waiting for data takes 0.05 s, the ranks' median 0 s"
    ]
    assert stragglers([[0.2, 0.0005], [0.2, 0.0]]) == []
