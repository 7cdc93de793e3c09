"""A real Slurm on this machine for tests: munged, slurmctld and several slurmd in a folder of their own.

Nothing of it is shared with a Slurm that may run here otherwise: own configuration, key, sockets and ports (all on
127.0.0.1), so that any number of clusters run side by side, one per test worker. The nodes share the machine's name,
file system and processes, and their CPUs are pretended: jobs set OMP_NUM_THREADS=1 and find each other by 127.0.0.1.
Needs no systemd and no cgroups; works for root in a container and for an ordinary user.
"""

from __future__ import annotations

import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "sinfo")
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
POLL_SECONDS = 0.05
ENDED = re.compile("BOOT_FAIL|CANCELLED|COMPLETED|DEADLINE|FAILED|NODE_FAIL|OUT_OF_MEMORY|PREEMPTED|TIMEOUT")


def missing_programs() -> list[str]:
    """What of Slurm is not installed; empty if a cluster can be started. ``make slurm`` installs it."""
    return [program for program in PROGRAMS if shutil.which(program, path=SEARCH_PATH) is None]


class ClusterError(RuntimeError):
    """The cluster did not do what it was asked to; the message ends with its logs."""


@dataclass(frozen=True)
class Task:
    """One job, or one task of a job array, as ``scontrol show job`` tells it."""

    job: int
    array_task: int | None
    state: str
    reason: str
    exit_code: int
    exit_signal: int
    restarts: int
    output: Path

    @property
    def ended(self) -> bool:
        return ENDED.fullmatch(self.state) is not None

    @property
    def name(self) -> str:
        """What scancel and scontrol call it: ``12`` or ``12_3``."""
        return str(self.job) if self.array_task is None else f"{self.job}_{self.array_task}"


@dataclass
class SlurmCluster:
    """A running cluster. ``env`` is the environment in which Slurm's commands speak to it."""

    folder: Path
    env: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(
        self, *command: str | Path, cwd: Path | None = None, timeout: float = 60, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command, successful or not, in the cluster's environment."""
        return subprocess.run(
            list(map(str, command)),
            env={**self.env, **env},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def call(self, *command: str | Path, cwd: Path | None = None, **env: str) -> str:
        """The stdout of a command.

        Raises:
            ClusterError: it failed.
        """
        done = self.run(*command, cwd=cwd, **env)
        if done.returncode != 0:
            raise ClusterError(f"{' '.join(map(str, command))} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def sbatch(self, *arguments: str | Path, cwd: Path | None = None, **env: str) -> int:
        """Submit a batch job with the real sbatch and return its id. ``cwd`` is where it runs and writes its output.

        Raises:
            ClusterError: sbatch refused it.
        """
        return int(self.call("sbatch", "--parsable", *arguments, cwd=cwd, **env).strip())

    def tasks(self, job: int) -> list[Task]:
        """The tasks of a job in the order of their array indices; one for a job that is no array.

        Tasks of an array that never started are one record in Slurm and one item here.
        """
        text = self.call("scontrol", "--oneliner", "show", "job", str(job))
        tasks = [_parse_task(line) for line in text.splitlines() if line.strip()]
        return sorted(tasks, key=lambda task: -1 if task.array_task is None else task.array_task)

    def wait(self, job: int, timeout: float = 180.0) -> list[Task]:
        """The tasks of a job when all have ended, whether well or not.

        Raises:
            ClusterError: it takes longer than ``timeout`` seconds.
        """
        return self.wait_until(job, lambda tasks: all(task.ended for task in tasks), timeout)

    def wait_until(self, job: int, reached: Callable[[list[Task]], bool], timeout: float = 180.0) -> list[Task]:
        """The tasks of a job as soon as ``reached`` holds for them.

        Raises:
            ClusterError: it takes longer than ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while not reached(tasks := self.tasks(job)):
            if time.monotonic() > deadline:
                raise ClusterError(f"job {job} after {timeout:.0f} s: {tasks}\n{self.output(job)}\n{self.logs()}")
            time.sleep(POLL_SECONDS)
        return tasks

    def output(self, job: int) -> str:
        """What a job (all tasks of an array, in order) wrote to its output files so far."""
        files = dict.fromkeys(task.output for task in self.tasks(job))
        return "".join(path.read_text(errors="replace") for path in files if path.exists())

    def processes(self, task: Task) -> list[psutil.Process]:
        """The processes that a task has started, on whichever node: for faults that Slurm itself does not make."""
        wanted = {"SLURM_JOB_ID": str(task.job)}
        if task.array_task is not None:
            wanted = {"SLURM_ARRAY_JOB_ID": str(task.job), "SLURM_ARRAY_TASK_ID": str(task.array_task)}
        return [process for process in _processes(self.folder) if wanted.items() <= _environ(process).items()]

    @contextmanager
    def without(self, node: str, task: Task) -> Iterator[None]:
        """Lose a node for the time of the body: its daemon and what a task has started there are killed, and the
        controller is told, which would find it out by itself in SlurmdTimeout (five minutes)."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        for process in self.processes(task):
            if _environ(process).get("SLURMD_NODENAME") == node:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")
        try:
            yield
        finally:
            _start(self, "slurmd", "-D", "-N", node, log=f"{node}.out")
            with suppress(ClusterError):  # refused where the daemon has registered first and the node is back already
                self.call("scontrol", "update", f"NodeName={node}", "State=RESUME")
            _wait_for(self, lambda: _is_idle(self, node))

    def logs(self, lines: int = 20) -> str:
        """The ends of the daemons' logs."""
        logs = ((path, path.read_text(errors="replace").splitlines()) for path in sorted(self.folder.glob("*.log")))
        return "\n".join(f"--- {path.name}\n" + "\n".join(text[-lines:]) for path, text in logs)


@contextmanager
def slurm_cluster(
    nodes: int = 2,
    cpus: int = 2,
    partitions: Sequence[str] = ("PartitionName=main Nodes=ALL Default=YES",),
    extra: str = "",
) -> Iterator[SlurmCluster]:
    """Start a cluster of ``nodes`` nodes of ``cpus`` (pretended) CPUs each, and end it with all of its jobs.

    ``partitions`` and ``extra`` are lines of slurm.conf; a partition may have its own MaxTime, PreemptMode and so on.

    Raises:
        ClusterError: it does not come up within 30 seconds.
    """
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: the path of a unix socket has at most 107 bytes
    folder.chmod(0o755)  # munged wants its socket to be reachable for everybody
    cluster = SlurmCluster(folder, _environment(folder))
    with _guarded(cluster):
        names = [f"n{number + 1}" for number in range(nodes)]
        ports = _free_ports(nodes + 1)
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o600)
        (folder / "slurm.conf").write_text(_configuration(folder, names, cpus, ports, partitions, extra))
        _start(cluster, "munged", "--foreground", *_munge_options(folder))
        _wait_for(cluster, (folder / "munge.socket").exists)
        _start(cluster, "slurmctld", "-D")
        for name in names:
            (folder / name).mkdir()
            _start(cluster, "slurmd", "-D", "-N", name, log=f"{name}.out")
        _wait_for(cluster, lambda: _idle_nodes(cluster) == nodes)
        yield cluster


def _environment(folder: Path) -> dict[str, str]:
    """The environment of a user: what another Slurm set for us is not passed on."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
    return {**inherited, "PATH": SEARCH_PATH, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}


def _configuration(
    folder: Path, names: Sequence[str], cpus: int, ports: Sequence[int], partitions: Sequence[str], extra: str
) -> str:
    host = socket.gethostname().split(".")[0]
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=65536"
        for name, port in zip(names, ports[1:], strict=True)
    )
    return f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser={getpass.getuser()}
SlurmdUser={getpass.getuser()}
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until its old credential has expired
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1
ReturnToService=2
# jobs have to ask for it, as on a cluster whose administrator wants that
JobRequeue=0
KillWait=5
MinJobAge=3600
{nodes}
{chr(10).join(partitions)}
{extra}
"""


def _munge_options(folder: Path) -> list[str]:
    names = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    return [f"--{option}={folder}/munge.{suffix}" for option, suffix in names.items()]


def _free_ports(count: int) -> list[int]:
    """Free ports below the range that the kernel hands out by itself; other processes begin to look elsewhere."""
    for base in range(20_000 + os.getpid() % 1000 * 10, 30_990, 10):
        with ExitStack() as stack:
            try:
                for port in range(base, base + count):
                    stack.enter_context(closing(socket.socket())).bind(("127.0.0.1", port))
            except OSError:
                continue
            return list(range(base, base + count))
    raise ClusterError(f"no {count} free ports between 20,000 and 31,000")


def _start(cluster: SlurmCluster, *command: str, log: str = "") -> None:
    name = command[-1] if log else command[0]
    with open(cluster.folder / (log or f"{name}.out"), "wb") as output:
        cluster.daemons[name] = subprocess.Popen(
            command, env=cluster.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )


def _wait_for(cluster: SlurmCluster, reached: Callable[[], bool], timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while not reached():
        dead = [name for name, daemon in cluster.daemons.items() if daemon.poll() is not None]
        if dead or time.monotonic() > deadline:
            raise ClusterError(f"no cluster: {f'{dead} ended' if dead else 'too slow'}\n{cluster.logs()}")
        time.sleep(POLL_SECONDS)


def _idle_nodes(cluster: SlurmCluster) -> int:
    shown = cluster.run("sinfo", "--noheader", "--Node", "--format=%N %T").stdout
    return len({line for line in shown.splitlines() if line.endswith(" idle")})


def _is_idle(cluster: SlurmCluster, node: str) -> bool:
    # a line for each of its partitions
    return set(cluster.run("sinfo", "--noheader", f"--nodes={node}", "--format=%T").stdout.split()) == {"idle"}


def _parse_task(line: str) -> Task:
    fields = dict(re.findall(r"(?:^| )([A-Za-z:]+)=(\S*)", line))
    exit_code, exit_signal = fields["ExitCode"].split(":")
    array_task = fields.get("ArrayTaskId")
    return Task(
        job=int(fields.get("ArrayJobId", fields["JobId"])),
        array_task=int(array_task) if array_task and array_task.isdigit() else None,
        state=fields["JobState"],
        reason=fields["Reason"],
        exit_code=int(exit_code),
        exit_signal=int(exit_signal),
        restarts=int(fields["Restarts"]),
        output=Path(fields["StdOut"]),
    )


@contextmanager
def _guarded(cluster: SlurmCluster) -> Iterator[None]:
    """Have a process at hand that removes the cluster when the body ends, or when we are killed."""
    guard = subprocess.Popen(
        [sys.executable, __file__, cluster.folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        guard.communicate()
        for daemon in cluster.daemons.values():
            daemon.wait()


def _remove(folder: Path) -> None:
    """Kill the daemons and whatever their jobs left running, and delete the folder."""
    while leftovers := list(_processes(folder)):
        for process in leftovers:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(POLL_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)


def _processes(folder: Path) -> Iterator[psutil.Process]:
    """The cluster's processes: they have its slurm.conf in their environment, or (slurmstepd) a log of it open."""
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            ours = _environ(process).get("SLURM_CONF") == str(folder / "slurm.conf")
            if ours or any(Path(opened.path).is_relative_to(folder) for opened in process.open_files()):
                yield process


def _environ(process: psutil.Process) -> dict[str, str]:
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return process.environ()
    return {}


if __name__ == "__main__":
    sys.stdin.read()  # ends with the process that holds the other end
    _remove(Path(sys.argv[1]))
