"""slurm/prepare.sbatch on a real Slurm: job arrays write the bytes that one plain command writes."""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from data_pipeline.testing import tiny_tokenizer

from .slurm_cluster import SlurmCluster

SCRIPT = Path(__file__).parents[2] / "slurm" / "prepare.sbatch"
WORDS = "the quick brown fox jumps over the lazy dog and then it sleeps until morning comes".split()  # noqa: SIM905
SETUP = f'export PATH="{Path(sys.executable).parent}:$PATH"\n'
CONTAINER = 'echo "in the container, $OMP_NUM_THREADS thread: $1" >&2; exec "$@"\n'


@dataclass(frozen=True)
class Preparation:
    """A configuration in a folder of its own, from which jobs are submitted."""

    folder: Path
    slurm: SlurmCluster

    def submit(self, *arguments: str, options: Sequence[str] = ()) -> int:
        """``sbatch OPTIONS slurm/prepare.sbatch ARGUMENTS``."""
        command = ("--cpus-per-task=1", *options, SCRIPT, *arguments)
        return self.slurm.sbatch(*command, cwd=self.folder, HEADRACE_SETUP="setup.sh")

    def submit_chain(self, tasks: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """``bash slurm/prepare.sbatch --submit TASKS ARGUMENTS``."""
        command = ("bash", SCRIPT, "--submit", tasks, "--cpus-per-task=1", *arguments)
        return self.slurm.run(*command, cwd=self.folder, HEADRACE_SETUP="setup.sh", **env)

    def command(self, *arguments: str) -> str:
        """Run `pretrain-data` without Slurm."""
        return self.slurm.call(sys.executable, "-m", "data_pipeline", *arguments, cwd=self.folder)

    def local(self, *overrides: str) -> dict[str, str]:
        """The hashes of what a plain ``pretrain-data prepare`` writes."""
        self.command("prepare", "data.yaml", "output=local", "processes=1", *overrides)
        return self.hashes("local")

    def hashes(self, output: str = "set") -> dict[str, str]:
        """SHA-256 of every file of a data set (what only a restart needs is left out)."""
        root = self.folder / output
        files = (path for path in sorted(root.rglob("*")) if path.is_file() and ".prepare" not in path.parts)
        return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def freeze_in_the_middle(self, job: int, task: int, tasks: int) -> dict[Path, int]:
        """Suspend an array task when it has done some of its parts; returns when each of these was done."""
        deadline = time.monotonic() + 30
        while not self.done(task, tasks):
            assert time.monotonic() < deadline, self.slurm.output(job)
            time.sleep(0.001)
        frozen = self.slurm.tasks(job)[task]
        for process in self.slurm.processes(frozen):
            process.suspend()
        done = self.done(task, tasks)
        assert "its share is" not in frozen.output.read_text(), "it was too fast to be frozen"
        return done

    def done(self, task: int, tasks: int) -> dict[Path, int]:
        records = (self.folder / "set" / ".prepare" / "parts").glob("*.json")
        return {path: path.stat().st_mtime_ns for path in records if int(path.stem) % tasks == task}


def job_ids(printed: str) -> list[int]:
    return [int(word) for word in printed.splitlines()[-1].partition("scancel ")[2].split()]


@pytest.fixture
def preparation(tmp_path: Path, slurm: SlurmCluster) -> Preparation:
    """Two sources, a quarter of each said twice: some dozens of parts, about ten shards."""
    random = np.random.default_rng(0)

    def source(name: str, documents: int) -> dict[str, Any]:
        texts = [" ".join(random.choice(WORDS, random.integers(1, 60))) for _ in range(documents * 3 // 4)]
        lines = [json.dumps({"text": texts[number % len(texts)]}) for number in range(documents)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        return {"kind": "jsonl", "domain": name, "files": [str(tmp_path / f"{name}.jsonl")]}

    (tmp_path / "given.model").write_bytes(tiny_tokenizer().model)
    (tmp_path / "setup.sh").write_text(SETUP)
    (tmp_path / "container.sh").write_text(CONTAINER)
    settings = {
        "output": "set",
        "tokenizer": {"path": "given.model"},
        "sources": {"prose": source("prose", 900), "verse": source("verse", 300)},
        "block_tokens": 64,
        "shard_tokens": 10_000,
        "part_bytes": 8_000,
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(settings))
    return Preparation(tmp_path, slurm)


def test_a_submitted_chain_writes_what_one_plain_command_writes(preparation: Preparation, slurm: SlurmCluster) -> None:
    environment = {"HEADRACE_CONTAINER": "bash container.sh", "OMP_NUM_THREADS": ""}
    submitted = preparation.submit_chain("3", "data.yaml", **environment)
    assert submitted.returncode == 0, submitted.stderr
    tokenizer, first, second, merge = job_ids(submitted.stdout)
    assert [task.state for task in slurm.wait(merge)] == ["COMPLETED"], slurm.output(first) + slurm.output(merge)
    for job in (first, second):
        assert [(task.array_task, task.exit_code) for task in slurm.tasks(job)] == [(0, 0), (1, 0), (2, 0)]
    assert "pretrain-data tokenizer data.yaml" in slurm.output(tokenizer)
    assert "pretrain-data prepare data.yaml processes=1 --task 1 --tasks 3" in slurm.output(first)
    assert slurm.output(first).count("in the container, 1 thread: pretrain-data") == 3
    assert preparation.hashes() == preparation.local()


def test_the_chain_has_an_array_for_each_pass(preparation: Preparation, slurm: SlurmCluster) -> None:
    submitted = preparation.submit_chain("9%2", "--hold", "data.yaml", "cleaning.exact_duplicates=true")
    chain = job_ids(submitted.stdout)
    assert [line.split(":")[0] for line in submitted.stdout.splitlines()[:-1]] == [
        "prepare-tokenizer", "prepare-pass1", "prepare-pass2", "prepare-pass3", "prepare-pass4", "prepare-merge",
    ]  # fmt: skip
    for before, job in itertools.pairwise(chain):
        shown = slurm.call("scontrol", "show", "job", str(job))
        assert f"Dependency=afterok:{before}" in shown
        assert ("ArrayTaskId=0-8%2" in shown) == (job != chain[-1])
    slurm.call("scancel", *map(str, chain))


def test_killed_tasks_continue(preparation: Preparation, slurm: SlurmCluster) -> None:
    work = "data.yaml", "part_bytes=2000"  # many parts, so that there is a middle
    job = preparation.submit(*work, options=["--array=4-8:4"])  # indices may begin anywhere and have steps
    done = preparation.freeze_in_the_middle(job, 0, 2)
    preparation.freeze_in_the_middle(job, 1, 2)
    slurm.call("scontrol", "requeue", f"{job}_4")
    slurm.call("scancel", f"{job}_8")
    requeued, cancelled = slurm.wait(job)
    assert (requeued.state, requeued.restarts, cancelled.state) == ("COMPLETED", 1, "CANCELLED"), slurm.output(job)
    printed = requeued.output.read_text()
    assert printed.index("restart 0: pretrain-data") < printed.index("restart 1: pretrain-data")
    assert "task 0 of 2, pass 1 of 2 (tokenise): its share is done; of all tasks' " in printed
    again = preparation.done(0, 2)
    assert {path: again[path] for path in done} == done, "parts were done twice"

    rest = preparation.submit(*work)  # one job for all that is left
    assert [task.state for task in slurm.wait(rest)] == ["COMPLETED"], slurm.output(rest)
    assert preparation.hashes() == preparation.local("part_bytes=8000")


def test_a_merge_that_comes_too_early_says_what_is_missing(preparation: Preparation, slurm: SlurmCluster) -> None:
    preparation.command("prepare", "data.yaml", "--task", "1", "--tasks", "2")
    job = preparation.submit("data.yaml", "--merge")
    assert [(task.state, task.exit_code) for task in slurm.wait(job)] == [("FAILED", 2)]
    assert "error: set can't be merged yet: of `tokenise`'s" in slurm.output(job)
    assert "are missing (the first: part 000000). Start the tasks again" in " ".join(slurm.output(job).split())


def test_a_wrong_configuration_is_refused_before_anything_is_queued(preparation: Preparation) -> None:
    done = preparation.submit_chain("3", "data.yaml", "shard_tokens=many")
    assert (done.returncode, done.stdout) == (2, "")
    assert "data.yaml: 'shard_tokens' = 'many'" in done.stderr
    done = preparation.submit_chain("none", "data.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--submit 'none': give the number of array tasks" in done.stderr


def test_a_chain_that_slurm_refuses_halfway_is_taken_back(preparation: Preparation, slurm: SlurmCluster) -> None:
    done = preparation.submit_chain("9000", "data.yaml")  # Slurm's MaxArraySize is 1001
    assert done.returncode == 1
    assert "Invalid job array specification" in done.stderr
    name, job = done.stdout.split(": job ")
    assert name == "prepare-tokenizer"
    assert [task.state for task in slurm.wait(int(job))] == ["CANCELLED"]


def test_a_failed_job_ends_with_the_exit_code_of_the_command_and_ends_the_chain(
    preparation: Preparation, slurm: SlurmCluster
) -> None:
    (preparation.folder / "verse.jsonl").unlink()
    submitted = preparation.submit_chain("2", "data.yaml")
    tokenizer, first, second, merge = job_ids(submitted.stdout)
    assert [(task.state, task.exit_code) for task in slurm.wait(tokenizer)] == [("FAILED", 2)]
    assert "verse.jsonl" in slurm.output(tokenizer)
    for job in (first, second, merge):
        assert [task.state for task in slurm.wait(job)] == ["CANCELLED"]


def test_array_indices_with_gaps_are_refused(preparation: Preparation, slurm: SlurmCluster) -> None:
    gaps = preparation.submit("data.yaml", options=["--array=0,1,5"])
    assert {(task.state, task.exit_code) for task in slurm.wait(gaps)} == {("FAILED", 2)}
    assert "the indices leave gaps, so shares can't be counted. Give a range such as --array=0-2" in slurm.output(gaps)
