"""What slurm/pretrain.sbatch calls inside a job: before the ranks are started, on each node, and after they ended.

``begin`` and ``end`` print assignments for the shell: the batch script alone speaks to Slurm, for a container may
lack its commands. Libraries are imported where they are needed: what only reads logs does not wait for torch.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_pipeline.errors import EXIT_CRASH, UserError, run_command
from data_pipeline.files import publish_json
from pretrain.monitor import read_attempts

from .restarts import MAX_CRASHES, judge, read_reports

if TYPE_CHECKING:
    from pretrain.config import Config

FIRST_PORT, PORTS = 18_000, 14_000
"""Below the ports that Linux hands out by itself."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__)

ConfigFile = Annotated[Path, typer.Argument()]
Overrides = Annotated[list[str] | None, typer.Argument()]


def shell(**values: object) -> str:
    """Assignments that a shell can evaluate."""
    return "\n".join(f"{name}={shlex.quote(str(value))}" for name, value in values.items())


@app.command()
def begin(
    config: ConfigFile,
    overrides: Overrides = None,
    job: Annotated[int, typer.Option(help="SLURM_JOB_ID")] = 0,
    life: Annotated[str, typer.Option(help="what tells this start from the job's others")] = "0",
    nodes: Annotated[int, typer.Option(help="that are left of the job")] = 1,
    follower: Annotated[bool, typer.Option("--follower", help="queued behind another job of the same run")] = False,
) -> None:
    """Check the configuration, and say where this start logs and meets. Runs on the first node."""
    from pretrain.config import load_config

    loaded = load_config(config, overrides or [])
    folder = loaded.run_folder
    # all of a whole job, even if they do not fit: the run then says what would
    use = nodes if nodes == int(os.environ.get("SLURM_JOB_NUM_NODES", nodes)) else fitting_nodes(loaded, nodes)
    attempts = len(read_attempts(folder))
    skip = ""
    if follower and attempts:
        verdict = judge(folder, attempts - 1, asked=False, crashes=_max_crashes())
        if verdict.action in ("done", "stop"):
            skip = str(verdict.exit_code)
            print(f"the job before has said the last word: {verdict.why}", file=sys.stderr)
    logs = folder / "logs" / f"job_{job}_{life}"
    port = free_port(job)
    ports = {"port": port, "check_port": free_port(job, port)}
    print(shell(folder=folder, attempts=attempts, logs=logs, use=use, skip=skip, **ports))


def fitting_nodes(config: Config, nodes: int) -> int:
    """The most of ``nodes`` nodes whose ranks divide every batch; 0 if none do."""
    from pretrain.engine import accumulation_steps

    for count in range(nodes, 0, -1):
        with suppress(UserError):
            accumulation_steps(config, count * ranks_of_node())
            return count
    return 0


def free_port(job: int, besides: int = 0) -> int:
    """A free port of this host, the same for the same job where nothing else took it in between."""
    for number in range(PORTS):
        port = FIRST_PORT + (job * 7 + number) % PORTS
        if port == besides:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port
    raise UserError(f"no port between {FIRST_PORT:,} and {FIRST_PORT + PORTS - 1:,} is free on {socket.gethostname()}.")


Meet = Annotated[str, typer.Option(help="HOST:PORT of the first node")]
Logs = Annotated[Path, typer.Option(help="folder for this start's logs")]


@app.command()
def node(config: ConfigFile, overrides: Overrides = None, meet: Meet = "", logs: Logs = Path("logs")) -> None:
    """Run this node's ranks: one for each GPU, or HEADRACE_RANKS_PER_NODE."""
    report = run_ranks(meet, logs, "pretrain", "train", str(config), *(overrides or []))
    publish_json(logs / f"node_{int(os.environ['SLURM_NODEID']):05d}.json", report)
    raise typer.Exit(report["exit_code"])


@app.command()
def check(folder: Annotated[Path, typer.Argument()], meet: Meet = "", logs: Logs = Path("logs")) -> None:
    """Let this node's ranks check the node (:mod:`launch.node_check`)."""
    checks = logs / "check"
    checks.mkdir(parents=True, exist_ok=True)
    run_ranks(meet, checks, "launch.node_check", str(checks), str(folder))


def run_ranks(meet: str, logs: Path, module: str, *arguments: str) -> dict[str, Any]:
    """A process of this module for each rank of this node, under torchrun's agent; how they ended."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    from .agent import PATIENCE_SECONDS, run_agent

    number, nodes = int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_STEP_NUM_NODES"])
    ranks = ranks_of_node()
    cpus = int(os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpus // ranks)))
    own = logs / f"node_{number:05d}"
    # what rank 0 says is the job's output; what the others say stands in their files
    tee = {rank: Std.ALL if number == rank == 0 else Std.NONE for rank in range(ranks)}
    launch = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=ranks,
        logs_specs=DefaultLogsSpecs(str(own), redirects=Std.ALL, tee=tee),
        # no prefix to its lines: an empty template would stand for torchrun's own
        role="",
        log_line_prefix_template="${role_name}",
        run_id=os.environ["SLURM_JOB_ID"],
        rdzv_backend="static",
        rdzv_endpoint=meet,
        rdzv_configs={"rank": number, "timeout": 900},
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGTERM,SIGINT",
        shutdown_timeout=PATIENCE_SECONDS,
    )
    ended = run_agent(launch, module, *arguments)
    name = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    return {**asdict(ended), "node": name, "told": f"{ended.told} on {name}" if ended.told else ""}


@app.command()
def checked(
    logs: Annotated[Path, typer.Argument()],
    nodes: Annotated[str, typer.Option(help="names of the nodes, in Slurm's order, with spaces between")] = "",
) -> None:
    """Say which nodes are broken or slow, and what is to be done: go on, or without them, or give up."""
    from .node_verdict import read_checks

    names = nodes.split()
    found = read_checks(logs / "check", names)
    print(f"node check: {found.summary}", file=sys.stderr)
    for name, why in found.slow.items():
        print(f"warning: node {name} is slow: {why}", file=sys.stderr)
    for name, why in found.broken.items():
        print(f"error: node {name} is broken: {why}", file=sys.stderr)
    if found.unknown:
        print(f"error: the nodes do not reach each other: {found.unknown}", file=sys.stderr)
    action, exclude = "train", ""
    if not found.fit:
        print(
            f"What the ranks said stands in {logs / 'check'}. HEADRACE_NODE_CHECK=no leaves this out.", file=sys.stderr
        )
        # all of them at once: it is not the nodes, but what they share
        action, exclude = ("requeue", ",".join(found.broken)) if 0 < len(found.broken) < len(names) else ("stop", "")
    print(shell(action=action, exit_code=EXIT_CRASH, exclude=exclude))


def ranks_of_node() -> int:
    """How many processes this node runs.

    Raises:
        UserError: nothing says it: there is no GPU.
    """
    for name in ("HEADRACE_RANKS_PER_NODE", "SLURM_GPUS_ON_NODE"):
        if given := os.environ.get(name):
            return int(given)
    import torch

    if count := torch.cuda.device_count():
        return count
    raise UserError(
        f"{socket.gethostname()} shows no GPU, so the number of processes is unknown. Ask sbatch for --gpus-per-node, "
        "or set HEADRACE_RANKS_PER_NODE to train on CPUs."
    )


@app.command()
def end(
    folder: Annotated[Path, typer.Argument()],
    attempts: Annotated[int, typer.Option(help="what begin said")] = 0,
    logs: Annotated[Path, typer.Option(help="what begin said")] = Path("logs"),
    asked: Annotated[bool, typer.Option("--asked", help="the job was asked to stop")] = False,
    lost: Annotated[str, typer.Option(help="nodes that Slurm has lost in the meantime")] = "",
    nodes: Annotated[str, typer.Option(help="that the ranks ran on, in Slurm's order, with spaces between")] = "",
) -> None:
    """Say what is to be done now that the ranks have ended, and why."""
    reports = read_reports(logs)
    verdict = judge(
        folder, attempts, asked=asked, reports=reports, crashes=_max_crashes(), lost=lost, nodes=nodes.split()
    )
    where = f" What the ranks said stands in {logs}." if verdict.action in ("stop", "again") else ""
    print(f"{verdict.action}: {verdict.why}{where}", file=sys.stderr, flush=True)
    print(shell(action=verdict.action, exit_code=verdict.exit_code, exclude=",".join(verdict.exclude)))


def _max_crashes() -> int:
    return int(os.environ.get("HEADRACE_MAX_CRASHES", MAX_CRASHES))


def main() -> None:
    """Entry point of ``python -m launch.job``."""
    sys.exit(run_command(app))


if __name__ == "__main__":
    main()
