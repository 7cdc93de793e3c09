"""How soon a run on Slurm does its first step, as a new one and resumed, and how long its preflight takes.

    python -m benchmarks.start_times [--repeats 5] [--save]

The demo's model and data (`configs/demo.yaml`) on two nodes of a real Slurm that is started for it on this machine
(`make slurm` installs it), one rank a node, submitted with `sbatch slurm/pretrain.sbatch`. ``start`` and ``resume`` are
from the call of `srun` that starts the ranks to the end of the first step that they do; each start is resumed once, by
the job itself, after a request to stop. ``node_check`` is what comes before, from its `srun` to that of the ranks.
``preflight`` is the whole command, with what it asks of Slurm. Limits for the medians (exit code 1 beyond them): 30 s
to the first step, a resume 5 s more than the start before it, 10 s for the preflight.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pretrain.monitor import read_attempts, read_metrics
from tests.cluster.slurm_cluster import SEARCH_PATH, SlurmCluster, missing_programs, slurm_cluster

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "start_times.json"
DEMO = ROOT / "configs" / "demo.yaml"
LIMITS = {"start": 30.0, "resume_beyond_start": 5.0, "preflight": 10.0}
PATIENCE_SECONDS = 300
NOTED = """\
#!/usr/bin/env bash
echo "$(date +%s.%N) $*" >>"$SRUN_CALLS"
exec {srun} "$@"
"""
"""Notes when the script calls srun, and calls it."""


def set_up(folder: Path) -> None:
    """The demo's data, and what the jobs source first: this Python, and an srun that is noted."""
    python = Path(sys.executable).parent
    command = [python / "pretrain-data", "prepare", ROOT / "configs" / "data" / "stdlib.yaml"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    srun = folder / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(NOTED.format(srun=shutil.which("srun", path=SEARCH_PATH)))
    srun.chmod(0o755)
    (folder / "setup.sh").write_text(f'export PATH="{srun.parent}:{python}:$PATH"\n')


def start_and_resume(slurm: SlurmCluster, folder: Path, name: str) -> dict[str, float]:
    """Seconds of one start, and of the resume after it."""
    calls, run = folder / f"{name}.calls", folder / "runs" / name
    environment = {"HEADRACE_SETUP": str(folder / "setup.sh"), "HEADRACE_RANKS_PER_NODE": "1", "SRUN_CALLS": str(calls)}
    words = ("--nodes=2", "--cpus-per-task=1", ROOT / "slurm" / "pretrain.sbatch", DEMO, f"run.name={name}")
    job = slurm.sbatch(*words, cwd=folder, **environment)

    def first_step(attempt: int) -> float | None:
        """When it was done, in Unix seconds."""
        attempts = read_attempts(run)[attempt:]
        ends = {line["step"]: line["time"] for line in read_metrics(run) if "objective" in line}
        return ends.get(attempts[0].first_step) if attempts else None

    ends = [wait_for(lambda: first_step(0), slurm, job)]
    slurm.call("scancel", "--batch", "--signal=USR1", str(job))  # as --signal does before the time limit
    ends.append(wait_for(lambda: first_step(1), slurm, job))
    slurm.call("scancel", str(job))
    slurm.wait(job)
    noted = [line.split() for line in calls.read_text().splitlines()]
    began = {kind: [float(words[0]) for words in noted if kind in words] for kind in ("check", "node")}
    return {
        "start": ends[0] - began["node"][0],
        "resume": ends[1] - began["node"][1],
        "resume_beyond_start": ends[1] - began["node"][1] - (ends[0] - began["node"][0]),
        "node_check": began["node"][0] - began["check"][0],
    }


def wait_for(found: Callable[[], float | None], slurm: SlurmCluster, job: int) -> float:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (value := found()) is None:
        if time.monotonic() > deadline:
            sys.exit(f"error: no first step within {PATIENCE_SECONDS} s\n{slurm.output(job)}")
        time.sleep(0.2)
    return value


def preflight(slurm: SlurmCluster, folder: Path) -> float:
    """Seconds of the command on a run that was never started."""
    command = (sys.executable, "-m", "launch", "preflight", DEMO, "--nodes", "2", "--ranks-per-node", "1")
    began = time.monotonic()
    done = slurm.run(*command, cwd=folder)
    seconds = time.monotonic() - began
    if done.returncode:
        sys.exit(f"error: the preflight ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return seconds


def measure(repeats: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {}
    loads = []
    with tempfile.TemporaryDirectory() as place, slurm_cluster() as slurm:
        folder = Path(place)
        set_up(folder)
        for number in range(repeats):
            loads.append(round(os.getloadavg()[0], 1))
            found = {**start_and_resume(slurm, folder, f"run_{number}"), "preflight": preflight(slurm, folder)}
            print({name: round(value, 1) for name, value in found.items()}, flush=True)
            for name, value in found.items():
                seconds.setdefault(name, []).append(round(value, 2))
    commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "seconds": {
            name: {"median": statistics.median(values), "least": min(values), "most": max(values), "all": values}
            for name, values in seconds.items()
        },
        "limits": LIMITS,
        "load_before_each": loads,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true", help=f"write benchmarks/results/{RESULT.name}")
    options = parser.parse_args()
    if missing := missing_programs():
        sys.exit(f"error: no Slurm here: {', '.join(missing)} missing. As root, `make slurm` installs it.")
    result = measure(options.repeats)
    print(json.dumps(result, indent=2))
    if options.save:
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    over = [name for name, limit in LIMITS.items() if result["seconds"][name]["median"] > limit]
    for name in over:
        print(f"{name}: over its limit of {LIMITS[name]:.0f} s", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
