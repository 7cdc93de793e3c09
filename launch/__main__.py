"""The command ``pretrain-launch``: local, slurm, preflight, sweep, status."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import UserError, run_command

if TYPE_CHECKING:
    from .preflight import Request

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

ConfigFile = Annotated[Path, typer.Argument(help="YAML file of the run")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, over the file")]
Ranks = Annotated[int, typer.Option(help="processes on this machine; one for each GPU")]
Nodes = Annotated[str, typer.Option(help="nodes of the job; a range such as 2-4 takes what is free")]
GpusPerNode = Annotated[int | None, typer.Option(min=1, help="GPUs of a node, one rank each")]
RanksPerNode = Annotated[int | None, typer.Option(min=1, help="ranks of a node without GPUs")]
CpusPerTask = Annotated[int | None, typer.Option(min=1, help="CPUs of a node, for all its ranks")]
GpuMemory = Annotated[str | None, typer.Option(help="of one GPU, as 80GB, to compare the estimate with")]
Time = Annotated[str | None, typer.Option(help="limit of one job, as sbatch takes it: 12:00:00, 2-00")]
Signal = Annotated[int, typer.Option(min=1, help="seconds before the limit at which the run is asked to save")]
Partition = Annotated[str | None, typer.Option(help="of the cluster")]
Account = Annotated[str | None, typer.Option(help="to charge")]
SbatchOption = Annotated[list[str] | None, typer.Option("--sbatch", help="a further option of sbatch, as --qos=high")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the exact commands, start and submit nothing")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.callback()
def launch() -> None:
    """Start runs: on this machine, on a Slurm cluster, many at once; check them before, and look at them after."""


@app.command()
def local(config: ConfigFile, overrides: Overrides = None, ranks: Ranks = 1) -> None:
    """Run on this machine under torchrun; the same command starts the run and goes on with it."""
    from .local import launch_local

    raise typer.Exit(launch_local(config, overrides or [], ranks))


@app.command()
def slurm(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Nodes = "1",
    gpus_per_node: GpusPerNode = None,
    ranks_per_node: RanksPerNode = None,
    cpus_per_task: CpusPerTask = None,
    gpu_memory: GpuMemory = None,
    time: Time = None,
    signal: Signal = 300,
    partition: Partition = None,
    account: Account = None,
    sbatch: SbatchOption = None,
    restarts: Annotated[int, typer.Option(min=0, help="further jobs behind it that go on with the run")] = 0,
    dry_run: DryRun = False,
) -> None:
    """Preflight, freeze code and configuration, and submit slurm/pretrain.sbatch with them."""
    from .slurm import launch_slurm

    request = _request(
        config, overrides, nodes, gpus_per_node, ranks_per_node, gpu_memory, time, signal, partition, account
    )
    options = _sbatch_options(nodes, gpus_per_node, cpus_per_task, time, signal, partition, account, sbatch)
    raise typer.Exit(launch_slurm(request, options, restarts, dry_run))


@app.command()
def preflight(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Nodes = "1",
    gpus_per_node: GpusPerNode = None,
    ranks_per_node: RanksPerNode = None,
    gpu_memory: GpuMemory = None,
    time: Time = None,
    signal: Signal = 300,
    partition: Partition = None,
    account: Account = None,
    as_json: AsJson = False,
) -> None:
    """Check all that can be known before the allocation. Ends with 2 where something would stop the run."""
    from .preflight import failed, show
    from .preflight import preflight as check

    found = check(
        _request(config, overrides, nodes, gpus_per_node, ranks_per_node, gpu_memory, time, signal, partition, account)
    )
    print(json.dumps([asdict(finding) for finding in found]) if as_json else show(found))
    raise typer.Exit(2 if failed(found) else 0)


@app.command()
def sweep(
    grid: Annotated[Path, typer.Argument(help="YAML file of the sweep")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, for every member")] = None,
    at_a_time: Annotated[int | None, typer.Option(min=1, help="members that run together; 1, on Slurm all")] = None,
    ranks: Ranks = 1,
    on_slurm: Annotated[bool, typer.Option("--slurm", help="as a job array instead of on this machine")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="with --slurm: wait for its end and show the table")] = False,
    table: Annotated[bool, typer.Option("--table", help="run nothing, show the table")] = False,
    nodes: Nodes = "1",
    gpus_per_node: GpusPerNode = None,
    ranks_per_node: RanksPerNode = None,
    cpus_per_task: CpusPerTask = None,
    gpu_memory: GpuMemory = None,
    time: Time = None,
    signal: Signal = 300,
    partition: Partition = None,
    account: Account = None,
    sbatch: SbatchOption = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Run every member of a grid that is not done yet, and show a table of all. Ends with 1 where members failed."""
    from . import sweep as sweeps

    if not on_slurm:
        of_slurm = {
            "--wait": wait, "--nodes": nodes != "1", "--gpus-per-node": gpus_per_node, "--time": time,
            "--ranks-per-node": ranks_per_node, "--cpus-per-task": cpus_per_task, "--partition": partition,
            "--account": account, "--sbatch": sbatch,
        }  # fmt: skip
        if given := [name for name, value in of_slurm.items() if value]:
            raise UserError(
                f"{', '.join(given)} says nothing of a sweep on this machine. Give --slurm for a job array, or --ranks "
                "for the processes of a member here."
            )
    elif ranks != 1:
        raise UserError(f"--ranks {ranks} says nothing of a job array. Give --gpus-per-node or --ranks-per-node.")
    request = _request(grid, None, nodes, gpus_per_node, ranks_per_node, gpu_memory, time, signal, partition, account)
    if not on_slurm:
        request = _local(request, ranks)
    opened = sweeps.open_sweep(grid, overrides or [], request)
    if isinstance(opened, int):
        raise typer.Exit(opened)
    if on_slurm and not table:
        options = _sbatch_options(nodes, gpus_per_node, cpus_per_task, time, signal, partition, account, sbatch)
        job = sweeps.submit(opened, options, at_a_time, request, dry_run)
        if job is None or not wait:
            return
        sweeps.wait(job)
    elif not table:
        sweeps.run_locally(opened, ranks, at_a_time or 1, dry_run)
        if dry_run:
            return
    rows = sweeps.results(opened)
    print(json.dumps(rows) if as_json else sweeps.show_results(rows))
    raise typer.Exit(1 if opened.open and not table else 0)


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="of a run, or of many")] = Path("runs"), as_json: AsJson = False
) -> None:
    """Show queue state, last step, rate, ETA and last error of every run below a folder."""
    from .status import show_status
    from .status import status as look

    found = look(folder)
    print(json.dumps([asdict(run) for run in found]) if as_json else show_status(found))


def _request(
    config: Path,
    overrides: list[str] | None,
    nodes: str,
    gpus: int | None,
    ranks: int | None,
    gpu_memory: str | None,
    time: str | None,
    signal: int,
    partition: str | None,
    account: str | None,
) -> Request:
    from .preflight import Request
    from .preflight.cluster import seconds_of
    from .slurm import node_range

    if gpus is not None and ranks is not None:
        raise UserError(
            "--gpus-per-node and --ranks-per-node are both given; one rank runs on each GPU. Leave one out."
        )
    return Request(
        config,
        overrides or [],
        nodes=node_range(nodes),
        ranks_per_node=ranks or gpus or 1,
        gpu_memory=_parsed("--gpu-memory", gpu_memory, bytes_of, "80GB, with its unit (KB, MB, GB or TB)"),
        time_limit=_parsed("--time", time, seconds_of, "12:00:00 or 2-00, as sbatch takes it"),
        signal_lead=float(signal),
        partition=partition,
        account=account,
        gpus=ranks is None,
    )


def _local(request: Request, ranks: int) -> Request:
    import torch

    from .preflight import Request

    return Request(
        request.path, ranks_per_node=ranks, gpu_memory=request.gpu_memory, gpus=torch.cuda.is_available(), cluster=False
    )


def _parsed(option: str, text: str | None, parse: Callable[[str], float | None], example: str) -> float | None:
    if text is None:
        return None
    try:
        return parse(text)
    except ValueError as error:
        raise UserError(f"{option} {text!r} can't be read. Give it as {example}.") from error


def bytes_of(text: str) -> float:
    """``80GB`` or ``1.5 tb``: without a unit 80 would mean 80 bytes.

    Raises:
        ValueError: it is no such thing.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])B", text.strip().upper())
    if found is None:
        raise ValueError(text)
    return float(found[1]) * 1000.0 ** ("KMGT".index(found[2]) + 1)


def _sbatch_options(
    nodes: str,
    gpus: int | None,
    cpus: int | None,
    time: str | None,
    signal: int,
    partition: str | None,
    account: str | None,
    further: list[str] | None,
) -> list[str]:
    given = {
        "nodes": nodes,
        "gpus-per-node": gpus,
        "cpus-per-task": cpus,
        "time": time,
        "signal": f"B:USR1@{signal}",
        "partition": partition,
        "account": account,
    }
    return [*(f"--{name}={value}" for name, value in given.items() if value is not None), *(further or [])]


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run_command(app))


if __name__ == "__main__":
    main()
