"""A `prepare` that dies, or meets a full disk, at any of the points at which a file becomes visible or goes."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import shutil
import sys
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

import data_pipeline.files
from data_pipeline.errors import UserError
from data_pipeline.prepare import Share, merge, prepare, prepare_share
from tests.data_pipeline.prepared import build, hashes, make_texts, plain_settings

KILLED, TOLD = 9, 2
FATES = {
    "killed before it": KILLED,
    "killed after it": KILLED,
    "the disk is full": TOLD,
    "killed while tidying": KILLED,
}


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Real processes that begin in milliseconds: forked from one that has imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two sources through all passes: some texts are too short, equal or alike."""
    first = make_texts(80, 1)
    second = [*first[:10], *(f"{text} x" for text in first[10:20]), "short", "", *make_texts(30, 9)]
    described = plain_settings(tmp_path_factory.mktemp("points"), {"first": ("d", first), "second": ("e", second)})
    quality = {"min_words": 2, "min_characters": None, "min_mean_word_length": None, "min_alphabetic_words": None}
    near = {"bands": 4, "permutations": 16}
    described["cleaning"] = {"normalise": {}, "quality": quality, "exact_duplicates": True, "near_duplicates": near}
    prepare(build(described))
    return described


def _whole(plain: dict[str, Any], tasks: int) -> None:
    settings = build(plain)
    if not tasks:
        prepare(settings)
        return
    for _ in range(settings.passes):
        for task in range(tasks):
            prepare_share(settings, Share(task, tasks))
    merge(settings)


def _until(plain: dict[str, Any], tasks: int, fate: str, point: int) -> None:
    """Prepare in this process, which meets its fate at the ``point``-th file that is published, or folder removed."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    met = 0
    replace, remove = os.replace, shutil.rmtree

    def here() -> bool:
        nonlocal met
        met += 1
        return met == point

    def published(source: Path, target: Path) -> None:
        if fate == "killed before it" and here():
            os._exit(KILLED)
        if fate == "the disk is full" and here():
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        replace(source, target)
        if fate == "killed after it" and here():
            os._exit(KILLED)

    def tidied(folder: Path) -> None:
        if fate == "killed while tidying" and here():
            os._exit(KILLED)
        remove(folder)
        if fate == "killed while tidying" and here():
            os._exit(KILLED)

    data_pipeline.files.os.replace = published
    shutil.rmtree = tidied
    try:
        _whole(plain, tasks)
    except UserError as error:
        os._exit(TOLD if "No space left on device" in str(error) else 1)


@dataclass(frozen=True)
class Trial:
    """Prepares of the same input that are started again after they met their fate."""

    context: ForkServerContext
    plain: dict[str, Any]
    folder: Path
    tasks: int

    def _ends_with(self, fate: str, point: int) -> int | None:
        settings = {**self.plain, "output": str(self.folder / "set")}
        process = self.context.Process(target=_until, args=(settings, self.tasks, fate, point))
        process.start()
        process.join()
        return process.exitcode

    def comes_to_the_same(self, fate: str, point: int) -> bool:
        """Whether there is such a point; if so, the next start must come to the bytes of an undisturbed run."""
        output = self.folder / "set"
        code = self._ends_with(fate, point)
        reached = code != 0
        if reached:
            assert code == FATES[fate], (fate, point)
            assert self._ends_with(fate, 0) == 0, (fate, point)
        assert hashes(output) == hashes(Path(self.plain["output"])), (fate, point)
        assert not list(output.rglob("*.tmp")), (fate, point)
        shutil.rmtree(output)
        return reached


def test_some_points(processes: ForkServerContext, plain: dict[str, Any], tmp_path: Path) -> None:
    trial = Trial(processes, plain, tmp_path, tasks=3)
    for fate, point in zip(FATES, (9, 50, 80, 2), strict=True):
        assert trial.comes_to_the_same(fate, point), fate


@pytest.mark.campaign
@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("tasks", [0, 3])
def test_every_point(
    processes: ForkServerContext, plain: dict[str, Any], tmp_path: Path, tasks: int, fate: str
) -> None:
    trial = Trial(processes, plain, tmp_path, tasks)
    points = next(point for point in itertools.count(1) if not trial.comes_to_the_same(fate, point))
    assert points >= (8 if fate == "killed while tidying" else 90)
