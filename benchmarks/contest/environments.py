"""The peers' virtual environments, made on first use outside the repository.

Two, because mosaicml-streaming needs an older numpy and transformers than the others. Every package of a lock file is
pinned and nothing is resolved again (``--no-deps``); torch comes first and by the version of `constraints.txt`, because
asked for in any other way it brings gigabytes of CUDA packages along. torchvision is left out of both: nothing measured
here touches an image.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent
LOCKS = {
    "peers": BENCHMARKS / "requirements-peers.txt",
    "mosaic": BENCHMARKS / "requirements-peers-mosaic.txt",
}


def cache_folder() -> Path:
    """Where environments, text and data sets of the benchmark are kept."""
    base = os.environ.get("HEADRACE_BENCHMARKS") or os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "headrace-benchmarks"


def find_interpreter(name: str) -> Path | None:
    """The interpreter of environment ``name``, if it is there and is what its lock file says."""
    folder = cache_folder() / f"env-{name}"
    ready = folder / ".ready"
    return folder / "bin/python" if ready.is_file() and ready.read_text() == _stamp(name) else None


def interpreter(name: str) -> Path:
    """The interpreter of environment ``name``, made first if need be (two minutes, 1.5 GB)."""
    if (found := find_interpreter(name)) is not None:
        return found
    folder = cache_folder() / f"env-{name}"
    print(f"making the environment {folder} from {LOCKS[name].name} ...", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--quiet", "--disable-pip-version-check"]
    constraints = BENCHMARKS.parent / "constraints.txt"
    torch = next(line for line in constraints.read_text().split() if line.startswith("torch=="))
    subprocess.run([*pip, torch], check=True)
    subprocess.run([*pip, "--no-deps", "--requirement", LOCKS[name]], check=True)
    (folder / ".ready").write_text(_stamp(name))
    return folder / "bin/python"


def _stamp(name: str) -> str:
    return hashlib.sha256(LOCKS[name].read_bytes() + sys.version.encode()).hexdigest()
