"""slurm/pretrain.sbatch on a real Slurm: two nodes, requests to stop, crashes, and what must not be started again."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.queue import remember
from pretrain.monitor import read_attempts
from tests.system.runs import FAULTY, Runs

from .slurm_cluster import SlurmCluster

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "pretrain.sbatch"
EVALUATE = ROOT / "slurm" / "evaluate.sbatch"
FAULT = f"""\
import os, runpy, sys
kill = os.kill
os.kill = lambda pid, number: kill(pid, int(os.environ.get("TEST_SIGNAL", number)))
here = os.environ.get("TEST_NODE", os.environ.get("SLURMD_NODENAME")) == os.environ.get("SLURMD_NODENAME")
if here and sys.orig_argv[1:4] == ["-m", "pretrain", "train"]:
    sys.argv = ["pretrain", *sys.orig_argv[3:]]
    runpy.run_path({str(FAULTY)!r}, run_name="__main__")
"""

pytestmark = pytest.mark.slow


def submit(runs: Runs, slurm: SlurmCluster, *arguments: str | Path, options: tuple[str, ...] = (), **env: str) -> int:
    """``sbatch OPTIONS slurm/pretrain.sbatch ARGUMENTS``, one rank a node."""
    setup = runs.folder / "setup.sh"
    setup.write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n')
    environment = {"HEADRACE_SETUP": str(setup), "HEADRACE_RANKS_PER_NODE": "1", "HEADRACE_NODE_CHECK": "no", **env}
    return slurm.sbatch("--cpus-per-task=1", *options, SCRIPT, *arguments, cwd=runs.folder, **environment)


def wait_for_lines(runs: Runs, name: str, count: int) -> None:
    metrics = runs.run_folder(name) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, f"{name} does not get to {count} lines"
        time.sleep(0.05)


def check_the_bits_of_a_straight_run(runs: Runs, slurm: SlurmCluster, job: int, signals: tuple[str, ...]) -> None:
    """The job ``stopped`` ended, after one attempt for each signal, as the run ``straight`` did."""
    (task,) = slurm.wait(job)
    printed = slurm.output(job)
    assert (task.state, task.restarts) == ("COMPLETED", len(signals)), printed
    attempts = read_attempts(runs.run_folder("stopped"))
    endings = [*[("stopped", 2)] * len(signals), ("done", 2)]
    assert [(attempt.reason, attempt.world_size) for attempt in attempts] == endings
    for attempt, name in zip(attempts, signals, strict=False):
        assert name in (attempt.signal or "")
    for before, after in itertools.pairwise(attempts):
        assert after.first_step == (before.last_step or 0) + 1
    assert "requeue: stopped on request at step" in printed
    assert "done: done at step 200" in printed
    assert "\ndone at step 200" in printed, "what rank 0 says, as it says it"
    assert runs.state_hashes("straight", 200) == runs.state_hashes("stopped", 200)
    assert runs.metrics("straight") == runs.metrics("stopped")
    logs = sorted(path.name for path in (runs.run_folder("stopped") / "logs").iterdir())
    assert logs == [f"job_{job}_{restart}_0" for restart in range(len(signals) + 1)]
    first_life = runs.run_folder("stopped") / "logs" / logs[0]
    assert len(list(first_life.glob("node_0000[01]/*/attempt_0/0/stderr.log"))) == 2


STEPS = ("training.steps=200", "evaluation.every_steps=50", "checkpoint.every_steps=100")


def test_two_nodes_stopped_twice_end_with_the_bits_of_a_straight_run(runs: Runs, slurm: SlurmCluster) -> None:
    assert runs.train(runs.config("straight"), *STEPS).returncode == 0
    job = submit(runs, slurm, runs.config("stopped"), *STEPS, options=("--nodes=2",))
    wait_for_lines(runs, "stopped", 20)
    slurm.call("scancel", "--batch", "--signal=USR1", str(job))  # as --signal does before the time limit
    slurm.wait_until(job, lambda tasks: tasks[0].restarts == 1)
    wait_for_lines(runs, "stopped", (read_attempts(runs.run_folder("stopped"))[0].last_step or 0) + 20)
    slurm.call("scontrol", "requeue", str(job))
    check_the_bits_of_a_straight_run(runs, slurm, job, ("SIGUSR1", "SIGTERM"))


SLOW = """\
import os, sys, time
if sys.orig_argv[1:4] == ["-m", "pretrain", "train"] and "TEST_ATTEMPTS" in os.environ:
    from pathlib import Path
    from pretrain.objective import Objective
    attempts = Path(os.environ["TEST_ATTEMPTS"])
    stops = attempts.read_text().count('"reason": "stopped"') if attempts.exists() else 0
    begin_step, pause = Objective.begin_step, {0: 1.0, 1: 1.0, 2: 0.2}.get(stops, 0.0)
    Objective.begin_step = lambda *arguments: time.sleep(pause) or begin_step(*arguments)
"""
"""Steps of a second until the run was stopped twice, and short ones until it was three times."""


@pytest.mark.campaign
def test_a_run_stopped_in_every_way_ends_with_the_bits_of_a_straight_run(runs: Runs, slurm: SlurmCluster) -> None:
    """By its time limit, which Slurm looks at twice a minute; by a job that may take its nodes; by its user. While it
    waits for the limit, another run hangs. A campaign: on a busy machine a minute is too short for a start."""
    code, attempts_file = runs.folder / "code", runs.run_folder("stopped") / "attempts.jsonl"
    code.mkdir()
    (code / "sitecustomize.py").write_text(SLOW)
    slow = {"HEADRACE_CODE": str(code), "TEST_ATTEMPTS": str(attempts_file)}
    limit = ("--nodes=2", "--time=1", "--signal=B:USR1@20")
    job = submit(runs, slurm, runs.config("stopped"), *STEPS, options=limit, **slow)
    hanging = stop_a_rank(runs, slurm)
    assert runs.train(runs.config("straight"), *STEPS).returncode == 0
    slurm.wait_until(job, lambda tasks: tasks[0].restarts == 1)
    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=10")  # that of its next lives
    check_that_its_node_is_left_out(runs, slurm, hanging)

    wait_for_lines(runs, "stopped", (read_attempts(runs.run_folder("stopped"))[0].last_step or 0) + 5)
    urgent = slurm.sbatch("--partition=urgent", "--exclusive", "--nodes=2", "--wrap=sleep 1", cwd=runs.folder)
    assert [task.state for task in slurm.wait(urgent)] == ["COMPLETED"]
    slurm.wait_until(job, lambda tasks: tasks[0].restarts == 2 and tasks[0].state == "RUNNING")
    wait_for_lines(runs, "stopped", (read_attempts(runs.run_folder("stopped"))[1].last_step or 0) + 5)
    slurm.call("scontrol", "requeue", str(job))
    check_the_bits_of_a_straight_run(runs, slurm, job, ("SIGUSR1", "SIGTERM", "SIGTERM"))


HOSTS = """\
import os, socket
if node := os.environ.get("SLURMD_NODENAME"):
    socket.gethostname = lambda: node
"""
"""The nodes of the cluster are one machine: so that no rank takes another node's for one that it can kill."""


def stop_a_rank(runs: Runs, slurm: SlurmCluster) -> int:
    """A job on two nodes, of which the second one's rank is stopped for good after some steps."""
    code = runs.folder / "hosts"
    code.mkdir()
    (code / "sitecustomize.py").write_text(HOSTS)
    nothing_but_steps = {
        "training": {"steps": 100_000},
        "evaluation": {"every_steps": None},
        "checkpoint": {"every_steps": None},
    }
    config = runs.config("hangs", resilience={"hang_seconds": 6.0, "hang_multiple": 5.0}, **nothing_but_steps)
    env = {"HEADRACE_CODE": str(code), "HEADRACE_SRUN": "--wait=5"}
    job = submit(runs, slurm, config, options=("--nodes=2",), **env)
    wait_for_lines(runs, "hangs", 10)
    victim = next(
        process
        for process in slurm.processes(slurm.tasks(job)[0])
        if "pretrain" in process.cmdline() and process.environ().get("RANK") == "1"
    )
    assert victim.environ()["SLURMD_NODENAME"] == "n2"
    victim.send_signal(signal.SIGSTOP)
    return job


def check_that_its_node_is_left_out(runs: Runs, slurm: SlurmCluster, job: int) -> None:
    slurm.wait_until(job, lambda tasks: tasks[0].restarts == 1)
    assert " ExcNodeList=n2 " in slurm.call("scontrol", "--oneliner", "show", "job", str(job))
    (attempt,) = read_attempts(runs.run_folder("hangs"))
    assert "rank 1 on n2 does not answer (stopped" in attempt.message
    assert attempt.guilty == (1,)
    assert "it goes on, without the node n2" in slurm.output(job)
    remember(runs.run_folder("hangs"), str(job), [])
    shown = launch(runs, slurm, "status", runs.run_folder("hangs")).stdout
    assert f"job {job} (" in shown
    assert ") without n2" in shown
    slurm.call("scancel", str(job))  # it waits for a node that is not there


def test_crashes_and_user_errors(runs: Runs, slurm: SlurmCluster) -> None:
    """A fault at one step: the first crash gained steps, the second none. A broken node is not used again."""
    code = runs.folder / "code"
    code.mkdir()
    (code / "sitecustomize.py").write_text(FAULT)
    fault = {"HEADRACE_CODE": str(code), "TEST_FAULT": "step:6"}
    job = submit(runs, slurm, runs.config("loop"), "resume=never", **fault)
    broken = {**fault, "TEST_NODE": "n2", "TEST_SIGNAL": str(int(signal.SIGBUS))}
    pair = submit(runs, slurm, runs.config("pair"), options=("--nodes=2",), **broken)
    wrong = submit(runs, slurm, runs.config("wrong"), "optimizer.learning_rate=1")
    missing = submit(runs, slurm, runs.config("missing"), "data.sources.a.path=/nowhere/data")
    (task,) = slurm.wait(job)
    printed = slurm.output(job)
    assert (task.state, task.exit_code, task.restarts) == ("FAILED", 1, 0), printed
    attempts = read_attempts(runs.run_folder("loop"))
    assert [(attempt.first_step, attempt.reason) for attempt in attempts] == [(1, None), (5, None)]
    assert "again: killed (no stop was recorded): rank 0 (process" in printed
    assert "It reached step 6, 6 beyond the furthest before" in printed
    assert "It did no step beyond 6, the furthest so far, so it would crash again" in printed
    for refused, told, started in ((wrong, "learning_rate", 0), (missing, "/nowhere/data", 1)):
        (task,) = slurm.wait(refused)
        assert (task.state, task.exit_code, task.restarts) == ("FAILED", 2, 0), slurm.output(refused)
        assert told in slurm.output(refused)
        assert len(read_attempts(runs.run_folder("wrong" if refused == wrong else "missing"))) == started
    slurm.wait_until(pair, lambda tasks: tasks[0].restarts == 1)
    assert " ExcNodeList=n2 " in slurm.call("scontrol", "--oneliner", "show", "job", str(pair))
    assert "it goes on, without the node n2" in slurm.output(pair)
    slurm.call("scancel", str(pair))


def launch(runs: Runs, slurm: SlurmCluster, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """``pretrain-launch ARGUMENTS`` in the cluster's environment."""
    setup = runs.folder / "setup.sh"
    setup.write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n')
    command = (sys.executable, "-m", "launch", *arguments)
    return slurm.run(*command, cwd=runs.folder, timeout=300, HEADRACE_SETUP=str(setup))


BROKEN_DISK = """\
import os, sys
if "launch.node_check" in sys.orig_argv and os.environ.get("SLURMD_NODENAME") == "n2":
    def give_back(*arguments):
        raise OSError(5, "Input/output error")
    os.posix_fadvise = give_back
"""


def test_a_broken_node_is_left_out_and_a_lost_one_is_done_without(runs: Runs, slurm: SlurmCluster) -> None:
    code = runs.folder / "code"
    code.mkdir()
    (code / "sitecustomize.py").write_text(BROKEN_DISK)
    check = {"HEADRACE_NODE_CHECK": "yes", "HEADRACE_CODE": str(code)}
    broken = submit(runs, slurm, runs.config("broken"), options=("--nodes=2",), **check)
    show = ("scontrol", "--oneliner", "show", "job", str(broken))
    # the node is left out, and the job released, a moment after the restart is counted
    slurm.wait_until(broken, lambda tasks: tasks[0].restarts == 1 and "ExcNodeList=n2" in slurm.call(*show))
    slurm.wait_until(broken, lambda tasks: "Held" not in tasks[0].reason)
    assert "error: node n2 is broken: rank 1: files: OSError: [Errno 5] Input/output error" in slurm.output(broken)
    slurm.call("scancel", str(broken))  # it waits for a node that is not there
    assert not read_attempts(runs.run_folder("broken"))

    steps = ("training.steps=150", "evaluation.every_steps=50")
    lost = submit(runs, slurm, runs.config("lost"), *steps, options=("--nodes=2",), HEADRACE_NODE_CHECK="yes")
    wait_for_lines(runs, "lost", 20)
    assert "node check: 2 nodes: " in slurm.output(lost)
    with slurm.without("n2", slurm.tasks(lost)[0]):
        (task,) = slurm.wait(lost)
    assert (task.state, task.restarts) == ("COMPLETED", 0), slurm.output(lost)
    assert "again: n2 was lost: it goes on with what is left" in slurm.output(lost)
    first, second = read_attempts(runs.run_folder("lost"))
    assert (first.world_size, second.world_size, second.reason, second.last_step) == (2, 1, "done", 150)
    assert second.first_step > 1
    logged = [line["step"] for line in runs.metrics("lost") if "objective" in line]
    assert logged == list(range(1, 151))


def test_submitting_checks_freezes_chains_and_evaluates(runs: Runs, slurm: SlurmCluster) -> None:
    config = runs.config("chained")
    words = ("slurm", config, "--ranks-per-node", "1", "--sbatch=--cpus-per-task=1", "--restarts", "1")
    refused = launch(runs, slurm, *words, "--nodes", "9")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "error   batch" in refused.stderr
    assert "error   slurm.nodes" in refused.stderr
    assert "nothing was submitted" in refused.stderr
    assert not runs.run_folder("chained").exists()

    submitted = launch(runs, slurm, *words)
    assert submitted.returncode == 0, submitted.stderr
    first, second = (int(line.rpartition(" ")[2]) for line in submitted.stdout.splitlines()[:2])
    config.write_text("nonsense")  # the jobs have a copy of their own
    again = launch(runs, slurm, *words[:1], runs.config("chained"), *words[2:])
    assert (again.returncode, again.stdout) == (2, "")
    assert "run.queued" in again.stderr
    (task,) = slurm.wait(second)
    assert (task.state, task.exit_code) == ("COMPLETED", 0), slurm.output(first) + slurm.output(second)
    assert "the job before has said the last word: done at step 20" in slurm.output(second)
    assert [attempt.reason for attempt in read_attempts(runs.run_folder("chained"))] == ["done"]
    (code,) = (runs.run_folder("chained") / "code").iterdir()
    assert f"{code}/run.yaml" in slurm.output(first)
    setup = str(runs.folder / "setup.sh")
    scored = slurm.sbatch("--array=20", EVALUATE, runs.run_folder("chained"), cwd=runs.folder, HEADRACE_SETUP=setup)
    (task,) = slurm.wait(scored)
    assert (task.state, task.exit_code) == ("COMPLETED", 0), slurm.output(scored)
    assert "evaluation heldout at step 20" in slurm.output(scored)
    shown = json.loads(launch(runs, slurm, "status", runs.folder / "runs", "--json").stdout)
    assert [(run["state"], run["step"], run["job"]) for run in shown] == [("done", 20, str(second))]


def test_a_sweep_as_an_array_tells_the_member_that_failed(runs: Runs, slurm: SlurmCluster) -> None:
    runs.config("base", training={"steps": 8}, evaluation={"every_steps": None})
    grid = runs.folder / "grid.yaml"
    grid.write_text("name: rates\nbase: base.yaml\ngrid:\n  optimizer.lr: [1.0e-3, 1.0e+30]\n")
    ended = launch(
        runs, slurm, "sweep", grid, "--slurm", "--wait", "--ranks-per-node", "1", "--sbatch=--cpus-per-task=1"
    )
    assert ended.returncode == 1, ended.stderr
    assert "| lr_0.001 | 0.001 | done | 8 |" in ended.stdout
    assert "1 of 2 members are not done" in ended.stdout
    assert "lr_1e_30: attempt 1: non-finite: step" in ended.stdout
