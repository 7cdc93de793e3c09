"""`prepare` shared by tasks: the bytes of one undisturbed run, whatever is shared out, killed, or started twice."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

import data_pipeline.prepare.claims as claims
import data_pipeline.prepare.workspace as workspaces
from data_pipeline.errors import UserError
from data_pipeline.prepare import PrepareSettings, Share, merge, prepare, prepare_share
from data_pipeline.prepare.claims import claim
from data_pipeline.prepare.workspace import Workspace, open_workspace
from data_pipeline.settings import build_settings
from tests.data_pipeline.prepared import build, hashes, make_texts, plain_settings

HOST = re.escape(socket.gethostname())


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Real processes that begin in milliseconds: forked from one that has imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, str]]:
    """Plain settings of about ten parts and ten shards, and the hashes of what one undisturbed prepare writes."""
    sources = {"first": ("domain-a", make_texts(200, 1)), "second": ("domain-b", make_texts(100, 2))}
    plain = plain_settings(tmp_path_factory.mktemp("reference"), sources)
    prepare(build(plain))
    return plain, hashes(Path(plain["output"]))


@pytest.fixture
def settings(reference: tuple[dict[str, Any], dict[str, str]], tmp_path: Path) -> PrepareSettings:
    return build(reference[0], output=str(tmp_path / "set"))


@pytest.fixture
def expected(reference: tuple[dict[str, Any], dict[str, str]]) -> dict[str, str]:
    return reference[1]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (claims, workspaces):
        monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.05)


def share_out(settings: PrepareSettings, tasks: int, order: list[int] | None = None) -> list[str]:
    """All tasks one after another, once; what they say."""
    return [prepare_share(settings, Share(task, tasks)) for task in order or range(tasks)]


@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
def test_the_bytes_do_not_depend_on_the_number_of_tasks(
    settings: PrepareSettings, expected: dict[str, str], tasks: int
) -> None:
    backwards = list(reversed(range(tasks)))
    share_out(settings, tasks, backwards)
    said = share_out(settings, tasks)
    assert said[-1] == f"task {tasks - 1} of {tasks}: all 2 passes are done; publish the data set with --merge"
    assert not (Path(settings.output) / "manifest.json").exists()
    merge(settings)
    assert hashes(Path(settings.output)) == expected
    assert all("is complete already: nothing was done" in said for said in share_out(settings, tasks))


def test_each_call_does_its_share_of_one_pass_and_says_what_is_missing(settings: PrepareSettings) -> None:
    parts = Path(settings.output) / ".prepare" / "parts"
    first = prepare_share(settings, Share(0, 3))
    found = re.fullmatch(
        r"task 0 of 3, pass 1 of 2 \(tokenise\): its share is done; of all tasks' (\d+) items, (\d+) are missing "
        r"\(the first: part 000001\)\. When all tasks are through this pass, start all of them again",
        first,
    )
    assert found, first
    done = sorted(int(path.stem) for path in parts.glob("??????.json"))
    assert done == list(range(0, int(found[1]), 3))
    assert int(found[2]) == int(found[1]) - len(done)
    assert prepare_share(settings, Share(0, 3)) == first
    prepare_share(settings, Share(2, 3))
    assert "pass 2 of 2 (write shards): its share is done" in prepare_share(settings, Share(1, 3))
    written = sorted(path.stem for path in (Path(settings.output) / "shards").glob("*.tar"))
    assert len(written) >= 3
    assert written == [f"{1 + 3 * number:06d}" for number in range(len(written))]


def test_a_plain_prepare_does_what_tasks_have_left(settings: PrepareSettings, expected: dict[str, str]) -> None:
    prepare_share(settings, Share(3, 4))
    prepare(settings)
    assert hashes(Path(settings.output)) == expected


def test_a_merge_that_comes_too_early_says_what_is_missing(settings: PrepareSettings, expected: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"set holds nothing to merge\. Run the tasks first \(--task I --tasks N\)"):
        merge(settings)
    prepare_share(settings, Share(0, 2))
    with pytest.raises(
        UserError, match=r"can't be merged yet: of `tokenise`'s \d+ items, \d+ are missing \(the first: part"
    ):
        merge(settings)
    prepare_share(settings, Share(1, 2))
    with pytest.raises(
        UserError, match=r"of `write shards`'s \d+ items, \d+ are missing \(the first: shard 000000\)\. Start"
    ):
        merge(settings)
    prepare_share(settings, Share(0, 2))
    merge(settings)
    assert hashes(Path(settings.output)) == expected


# ---- killed ----


def _work(settings: PrepareSettings, share: Share) -> None:
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        prepare_share(settings, share)
    except UserError:  # a pass that began twice: somebody else is at the item
        os._exit(2)


@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
def test_tasks_killed_at_random_continue_to_the_same_bytes(
    settings: PrepareSettings, expected: dict[str, str], processes: ForkServerContext, tasks: int
) -> None:
    draw = random.Random(tasks)
    folder = Path(settings.output)

    def published() -> int:
        return sum(path.suffix != ".tmp" for path in folder.rglob("*"))

    killed = 0
    for _ in range(10):
        moment = published() + draw.randint(1, 25)
        running = [processes.Process(target=_work, args=(settings, Share(task, tasks))) for task in range(tasks)]
        for process in running:
            process.start()
        while published() < moment and any(process.is_alive() for process in running):
            time.sleep(draw.uniform(0, 0.004))
        for process in draw.sample(running, len(running)):
            process.kill()
        for process in running:
            process.join()
            killed += process.exitcode == -signal.SIGKILL
            assert process.exitcode in (0, -signal.SIGKILL)
    assert killed >= 4, "the kills came too late to show anything"
    share_out(settings, tasks)
    share_out(settings, tasks)
    merge(settings)
    assert hashes(Path(settings.output)) == expected


def test_commands_of_tasks(settings: PrepareSettings, expected: dict[str, str], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(settings.model_dump_json())

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "data_pipeline", "prepare", str(config), *arguments]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    for wrong, message in (
        (("--task", "2", "--tasks", "2"), "task 2 of 2 tasks does not exist. Count tasks from 0 to tasks - 1"),
        (("--task", "0"), "give --task and --tasks together, and --merge without them"),
        (("--task", "0", "--tasks", "1", "--merge"), "give --task and --tasks together, and --merge without them"),
    ):
        done = command(*wrong)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
    done = command("--task", "0", "--tasks", "1")
    assert (done.returncode, done.stdout) == (
        0,
        "task 0 of 1: all 2 passes are done; publish the data set with --merge\n",
    )
    done = command("--merge")
    assert done.returncode == 0
    assert "data set   " in done.stdout
    assert hashes(Path(settings.output)) == expected
    assert "is complete already" in command("--task", "0", "--tasks", "1").stdout
    done = command()
    assert done.returncode == 0
    assert f"{settings.output} is complete already: nothing was done." in done.stderr


# ---- started twice ----


def _hold(folder: Path, share: Share, ready: Any) -> None:
    with open_workspace(folder, share):
        ready.set()
        time.sleep(600)


@pytest.fixture
def holder(settings: PrepareSettings, processes: ForkServerContext) -> Iterator[multiprocessing.Process]:
    """Another process that is task 0 of 2."""
    ready = processes.Event()
    process = processes.Process(target=_hold, args=(Path(settings.output), Share(0, 2), ready))
    process.start()
    assert ready.wait(30)
    yield process  # type: ignore[misc]
    process.kill()
    process.join()


@pytest.mark.usefixtures("impatient")
def test_the_same_task_twice_is_an_error_that_names_the_other(
    settings: PrepareSettings, holder: multiprocessing.Process, expected: dict[str, str]
) -> None:
    other = (
        rf"task 0 of 2 is being done by task 0 of 2 \(host {HOST}, process {holder.pid}\); this is task 0 of 2 \(host"
    )
    with pytest.raises(UserError, match=other):
        prepare_share(settings, Share(0, 2))
    prepare_share(settings, Share(1, 2))
    for alone in (prepare, merge):
        with pytest.raises(UserError, match=r"another process is preparing .*set\. Wait for it"):
            alone(settings)
    holder.kill()
    holder.join()
    prepare_share(settings, Share(0, 2))
    prepare(settings)
    assert hashes(Path(settings.output)) == expected


@pytest.mark.usefixtures("impatient")
def test_a_task_does_not_begin_beside_a_plain_prepare(settings: PrepareSettings) -> None:
    with (
        open_workspace(Path(settings.output)),
        pytest.raises(UserError, match=r"a process that does not share its work .* is preparing .*set\. Wait for it"),
    ):
        prepare_share(settings, Share(0, 2))


@pytest.mark.usefixtures("impatient")
def test_two_tasks_at_one_item_is_an_error_that_names_the_holder(
    settings: PrepareSettings, expected: dict[str, str]
) -> None:
    """Tasks of different numbers of tasks meet at an item."""
    folder = Path(settings.output)
    with open_workspace(folder, Share(1, 3)), claim(Workspace(folder).claims, "part 000004", Share(1, 3)):
        with pytest.raises(UserError, match=rf"part 000004 is being done by task 1 of 3 \(host {HOST}, process \d+\)"):
            prepare_share(settings, Share(0, 2))
        assert "pass 1 of 2 (tokenise): its share is done" in prepare_share(settings, Share(1, 2))
    share_out(settings, 2)
    with open_workspace(folder, Share(1, 3)), claim(Workspace(folder).claims, "shard 000002", Share(1, 3)):
        pass
    share_out(settings, 2)
    merge(settings)
    assert hashes(folder) == expected


def test_tasks_of_another_plan_are_refused(settings: PrepareSettings) -> None:
    prepare_share(settings, Share(0, 2))
    other = settings.model_copy(update={"seed": 9})
    for begin in (lambda: prepare_share(other, Share(1, 2)), lambda: merge(other)):
        with pytest.raises(UserError, match=r"was begun with something else: settings\.seed was 0, now it is 9"):
            begin()


def test_left_over_files_go_when_nobody_else_is_there(settings: PrepareSettings) -> None:
    folder = Path(settings.output)
    with open_workspace(folder, Share(0, 2)):
        other = folder / "shards" / ".000000.tar.host.1.tmp"
        other.write_bytes(b"being written by another task")
        foreign = [folder / ".notes.txt.tmp", folder / "mine" / ".draft.tmp"]
        for path in foreign:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"nobody else's business")
        with open_workspace(folder, Share(1, 2)):
            assert other.exists()
    with open_workspace(folder, Share(1, 2)):
        assert not other.exists()
        assert all(path.exists() for path in foreign)


@pytest.mark.parametrize(("task", "tasks"), [(2, 2), (-1, 2), (0, 0)])
def test_wrong_task_numbers(task: int, tasks: int) -> None:
    with pytest.raises(UserError, match=rf"task {task} of {tasks} tasks does not exist\. Count tasks from 0"):
        Share(task, tasks)


def test_bad_records_may_be_dropped_by_a_later_start(settings: PrepareSettings) -> None:
    """The advice of the error works: what is finished stays, the rest leaves the record out."""
    name, source = list(settings.sources.items())[-1]
    bad = Path(source.files[0])  # type: ignore[union-attr]
    bad.write_text(bad.read_text() + "no json\n")
    with pytest.raises(UserError, match="on_bad_record: drop"):
        prepare(settings)
    plain = settings.model_dump(mode="json")
    for changed in plain["sources"].values():
        changed["on_bad_record"] = "drop"
    manifest = prepare(build_settings(PrepareSettings, plain, "test"))
    assert manifest.sources[name]["rejected"]["source"]
