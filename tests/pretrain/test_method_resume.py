"""Law 5 for every method: a run that resumes has the same bits; on other ranks it makes the same updates.

The methods are the rows of ``test_method_matrix``. By default those that keep state of their own resume on two ranks,
each at one stage; every method at all stages, ranks and accumulations is a campaign. What a whole run does about a
resume is in ``tests/system``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.marks import campaign
from tests.ranks import run_on_ranks

from .methods import Method, families
from .steps import EngineRun, relative_difference
from .test_method_matrix import TOLERANCES, Case, configured

SAVED, DONE = 2, 4
"""Steps before the checkpoint, and in all: the second half of the first pruning, of GaLore's gap and of a warm-up."""

Chosen = dict[str, tuple[Method, list[Case]]]
"""Name to a row of the matrix and the cases to run it in."""

KEEPS_STATE = {
    "linear": ("lost", "sltrain", "magnitude_pruned, on the way"),
    "optimizers": ("muon", "galore"),
    "reweighting": ("one-pass",),
}
"""What a resumed run needs more of than weights and Adam's moments: buffers, state of matrices, the loss range. Experts
have a test of their own (``test_experts_resume.py``)."""


def lean() -> Chosen:
    rows = {f"{family}: {name}": families()[family][name] for family, names in KEEPS_STATE.items() for name in names}
    return {
        name: (method, [(method.stages[(number + 1) % len(method.stages)], (1, 4)[number % 2], "none")])
        for number, (name, method) in enumerate(rows.items())
    }


def whole(family: str) -> Chosen:
    return {
        name: (method, [(stage, micro_steps, "none") for stage in method.stages for micro_steps in (1, 4)])
        for name, method in families()[family].items()
    }


def resumed(family: str | None) -> list[tuple[str, list[str], bool]]:
    """On one rank, for each method (of a family, or ``lean``) and case: what it is, what differs after a resume, and
    whether it went on."""
    from pretrain.distributed import start

    ranks, found = start(60), []
    for name, (method, cases) in (whole(family) if family else lean()).items():
        for case in cases:
            config = configured(method, ranks.world_size, case)
            straight = EngineRun(config, ranks, method.initial(config))
            for step in range(SAVED):
                straight.step(step)
            saved, carried = straight.engine.full_parameters(), (straight.loss_range, straight.frequencies)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(ranks.broadcast_object(folder))
                straight.engine.save(path)
                ranks.barrier()
                again = EngineRun(config, ranks, empty=True)
                again.engine.load(path)
                ranks.barrier()
            again.loss_range, again.frequencies = carried
            seen = [[run.step(step) for step in range(SAVED, DONE)] for run in (straight, again)]
            one, other = straight.engine.full_parameters(), again.engine.full_parameters()
            differ = [key for key in one if not torch.equal(one[key], other[key])]
            differ += ["losses, objectives, norms"] if seen[0] != seen[1] else []
            where = f"{name}: {ranks.world_size} ranks, stage {case[0]}, {case[1]} micro-steps"
            found.append((where, differ, any(not torch.equal(one[key], saved[key]) for key in one)))
    return found


def assert_same_bits(world_size: int, family: str | None, timeout: float = 500) -> None:
    for results in run_on_ranks(resumed, world_size, family, timeout=timeout):
        assert results
        for where, differ, moved in results:
            assert not differ, where
            assert moved, where


@pytest.mark.slow
def test_methods_with_state_resume_to_the_bit() -> None:
    assert_same_bits(2, None)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("family", families())
def test_every_method_resumes_to_the_bit(family: str, world_size: int) -> None:
    assert_same_bits(world_size, family, timeout=3500)


Seen = tuple[dict[str, Tensor], dict[str, Tensor], list[tuple[float, float, float]]]
"""Parameters after the checkpoint, what the steps after it added to them, and losses, objectives, norms of those."""


def on_these_ranks(folder: Path, saves: bool, family: str | None) -> dict[str, tuple[Seen, dict[str, float]]]:
    """On one rank: the steps after a checkpoint of each method in ``folder``, which is made where ``saves`` and else
    loaded at another stage than it was saved at, or at every one of the stages of a family's methods."""
    from pretrain.distributed import start

    ranks, found = start(60), {}
    rows = whole(family) if family else lean()
    for number, (name, (method, _)) in enumerate(rows.items()):
        if method.hangs_on_ranks:
            continue
        path, there = folder / str(number), method.stages[number % len(method.stages)]
        others = method.stages if family else [method.stages[(number + 1) % len(method.stages)]]
        for stage in [there] if saves else others:
            config = configured(method, ranks.world_size, (stage, 1, "none"))
            run = EngineRun(config, ranks, method.initial(config) if saves else None, empty=not saves)
            if saves:
                for step in range(SAVED):
                    run.step(step)
                run.engine.save(path)
                torch.save((run.loss_range, run.frequencies), path / "carried")
            else:
                run.engine.load(path)
                run.loss_range, run.frequencies = torch.load(path / "carried", weights_only=False)
            before = run.engine.full_parameters()
            numbers = [run.step(step) for step in range(SAVED, DONE)]
            added = {key: value - before[key] for key, value in run.engine.full_parameters().items()}
            where = name if saves else f"{name}: stage {there}, then {stage}"
            found[where] = (before, added, numbers), {**TOLERANCES, **method.tolerances}
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("there", "here", "family"),
    [
        (2, 1, None),
        *(campaign(*ranks, family) for ranks in ((1, 4), (4, 2)) for family in families()),
    ],
)
def test_methods_go_on_with_other_ranks_and_stages(tmp_path: Path, there: int, here: int, family: str | None) -> None:
    """The same weights to the bit, then the same updates."""
    saved = run_on_ranks(on_these_ranks, there, tmp_path, True, family, timeout=3500)[0]
    loaded = run_on_ranks(on_these_ranks, here, tmp_path, False, family, timeout=3500)[0]
    assert {where.rsplit(": stage", 1)[0] for where in loaded} == set(saved)
    for where, ((before, added, numbers), bounds) in loaded.items():
        one = saved[where.rsplit(": stage", 1)[0]][0]
        assert all(torch.equal(value, before[key]) for key, value in one[0].items()), where
        assert relative_difference(added, one[1]) < bounds["updates"], where
        for others, expected in zip(numbers, one[2], strict=True):
            assert others == pytest.approx(expected, rel=bounds["losses"]), where
