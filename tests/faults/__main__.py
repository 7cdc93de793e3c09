"""The fault campaign: ``python -m tests.faults --kills 200 --seed 1 [--folder DIR] [--result FILE]``.

Ends with 1, and says what, where a run did not end as the undisturbed one. With the same seed the same kills are
drawn; what they hit hangs on the machine's moment.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

from tests.system.runs import Runs, write_tiny_data

from .disturbances import Disturbances
from .forked import RANKS, warm_up
from .kills import KILLS_OF_A_RUN, STAGES, Kills
from .places import PLACES


def commit() -> str:
    described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return described.stdout.strip()


def summary(kills: Kills, seed: int, seconds: float) -> dict[str, Any]:
    tally = kills.tally
    return {
        "seed": seed,
        "kills": tally.count,
        "runs": tally.runs,
        "runs_equal_to_the_undisturbed_one": tally.equal,
        "kills_that_never_came": tally.missed,
        "by_place": {name: {str(stage): tally.kills[name, stage] for stage in (0, 1, 2, 3)} for name in sorted(PLACES)},
        "problems": tally.problems,
        "seconds": round(seconds),
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def disturb(kills: Kills) -> dict[str, str]:
    """All other disturbances, at a stage and with a kind of save that are drawn for each; what came of them."""
    came: dict[str, str] = {}
    for name in Disturbances(kills, 0, False).all():
        stage, asynchronous = kills.random.choice(STAGES), kills.random.random() < 0.5
        where = f"ZeRO {stage}, {'asynchronous' if asynchronous else 'synchronous'} saves"
        try:
            Disturbances(kills, stage, asynchronous).all()[name]()
            came[name] = f"as it should be ({where})"
        except AssertionError as error:
            came[name] = f"wrong ({where}): {str(error)[-3000:]}"
            kills.tally.problems.append(f"{name}: {came[name]}")
        print(f"{name}: {came[name][:200]}", flush=True)
    return came


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only-kills", action="store_true", help="leave out the other disturbances")
    parser.add_argument("--folder", type=Path, help="for the runs; a temporary one if left out")
    parser.add_argument("--result", type=Path, help="a JSON file, written after every run")
    arguments = parser.parse_args()
    started = time.monotonic()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="faults"))
    write_tiny_data(folder / "data")
    kills = Kills(Runs(folder, folder / "data"), arguments.seed)
    warm = warm_up(kills.config("warm", 3), [], folder / "modules.json")
    assert warm.codes == (0,) * RANKS, warm.log
    found = summary(kills, arguments.seed, 0.0)
    while kills.tally.count < arguments.kills:
        kills.one_run(min(KILLS_OF_A_RUN, arguments.kills - kills.tally.count))
        found = summary(kills, arguments.seed, time.monotonic() - started)
        if arguments.result:
            arguments.result.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{found['kills']} kills, {found['runs']} runs, {found['seconds']} s", flush=True)
        if not kills.tally.problems:
            shutil.rmtree(kills.runs.run_folder(f"run{kills.tally.runs - 1}"))
    if not arguments.only_kills:
        found["disturbances"] = disturb(kills)
        if arguments.result:
            arguments.result.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    if not arguments.folder and not kills.tally.problems:
        shutil.rmtree(folder)
    return 1 if kills.tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
