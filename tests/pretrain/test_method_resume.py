"""Law 5 for every method: a run that resumes has the same bits; on other ranks it makes the same updates.

The methods are the rows of ``test_method_matrix``. By default those that keep state of their own resume on two ranks,
each at one stage; every method at all stages, ranks and accumulations is a campaign. What a whole run does about a
resume is in ``tests/system``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

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


def at_stage_0(folder: Path, saves: bool, family: str | None) -> dict[str, dict[str, Any]]:
    """On one rank, at stage 0: the steps after a checkpoint in ``folder``, which is made where ``saves``."""
    from pretrain.distributed import start

    ranks, found = start(60), {}
    rows = whole(family) if family else lean()
    for number, (name, (method, _)) in enumerate(rows.items()):
        if method.hangs_on_ranks:
            continue
        config, path = configured(method, ranks.world_size, (0, 1, "none")), folder / str(number)
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
        after = run.engine.full_parameters()
        added = {key: value - before[key] for key, value in after.items()}
        found[name] = {"before": before, "added": added, "numbers": numbers, "bounds": method.tolerances}
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("there", "here", "family"),
    [(2, 1, None), *(pytest.param(1, 4, family, marks=pytest.mark.campaign) for family in families())],
)
def test_methods_go_on_with_other_ranks(tmp_path: Path, there: int, here: int, family: str | None) -> None:
    """Stage 0, which shards nothing: the same weights, then the same updates."""
    saved = run_on_ranks(at_stage_0, there, tmp_path, True, family)[0]
    loaded = run_on_ranks(at_stage_0, here, tmp_path, False, family)[0]
    assert saved.keys() == loaded.keys()
    assert saved
    for name, one in saved.items():
        other, bounds = loaded[name], {**TOLERANCES, **one["bounds"]}
        assert all(torch.equal(value, other["before"][key]) for key, value in one["before"].items()), name
        assert relative_difference(other["added"], one["added"]) < bounds["updates"], name
        for numbers, others in zip(one["numbers"], other["numbers"], strict=True):
            assert others == pytest.approx(numbers, rel=bounds["losses"]), name
