"""The runs of a study: each a real ``pretrain train`` in a process of its own, done once and then known.

What a run gave is a line of ``studies/results/STUDY.jsonl``, under a key made of the settings that it was given and of
the identity of its data: a study that is started again does only what is missing, one whose settings changed does the
changed runs anew. The line has the commit that it was measured at. A run that was interrupted goes on from its newest
checkpoint, where its configuration saves any.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from data_pipeline.errors import UserError
from data_pipeline.manifest import read_manifest
from pretrain.config import Config, load_config
from pretrain.model import ModelSettings, ParameterCount, count_parameters
from pretrain.monitor import read_attempts, read_metrics

from .worker import train_in_process

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "studies/results"
DATA = ROOT / "studies/data.yaml"
BASE = ROOT / "studies/base.yaml"
VOCABULARY = 1024
"""Of ``studies/data.yaml``."""
CURVE_POINTS = 20
_APPENDING = threading.Lock()

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """One training run of a study."""

    labels: Mapping[str, Any]
    """What tells it from the study's other runs, as tables name it; JSON values."""
    overrides: Mapping[str, Any]
    """Dotted keys over ``studies/base.yaml``."""

    @property
    def name(self) -> str:
        return "-".join(f"{key}_{value}" for key, value in self.labels.items()).replace("+", "").replace(" ", "_")


@dataclass(frozen=True)
class Study:
    """A study's name and the runs that it consists of, in the order in which they shall be done."""

    name: str
    runs: Sequence[Run]

    @property
    def results_file(self) -> Path:
        return RESULTS / f"{self.name}.jsonl"

    def results(self) -> list[dict[str, Any]]:
        """What is known of the runs, in their order: labels, what :func:`outcome` says, and the ``commit``."""
        known = self._known()
        keys = {run.name: key_of(run, self._config(run)) for run in self.runs}
        return [{**run.labels, **known[keys[run.name]]} for run in self.runs if keys[run.name] in known]

    def do(self, at_once: int) -> list[dict[str, Any]]:
        """Do the runs that are missing, ``at_once`` at a time, and return :meth:`results`.

        Raises:
            UserError: a run's configuration is refused, or a run ended in another way than done or diverged.
        """
        known = self._known()
        configs = [(run, self._config(run)) for run in self.runs]
        missing = [(run, config) for run, config in configs if key_of(run, config) not in known]
        print(f"{self.name}: {len(self.runs) - len(missing)} of {len(self.runs)} runs are known", flush=True)
        threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // at_once))
        started = time.monotonic()
        with ThreadPoolExecutor(at_once) as pool:
            waiting = [pool.submit(self._do_one, run, config, threads) for run, config in missing]
            try:
                for done, future in enumerate(waiting, start=1):
                    line = future.result()
                    left = (time.monotonic() - started) / done * (len(missing) - done) / 60
                    loss = line["result"].get("heldout_loss")
                    told = "diverged" if loss is None else f"held-out loss {loss:.4f}"
                    print(f"{done}/{len(missing)}  {line['run']}  {told}  {left:.0f} min left", flush=True)
            finally:
                pool.shutdown(cancel_futures=True)
        return self.results()

    def _do_one(self, run: Run, config: Config, threads: int) -> dict[str, Any]:
        folder = ROOT / config.run_folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_name(f"{folder.name}.log")
        code = train_in_process(BASE, self._arguments(run), ROOT, log, threads)
        attempts = read_attempts(folder) if folder.is_dir() else []
        if code and not (attempts and attempts[-1].reason == "non_finite"):
            raise UserError(f"the run {run.name} failed. {log.read_text().strip()[-2000:]}")
        line = {
            "key": key_of(run, config),
            "run": run.name,
            "commit": commit(),
            "result": outcome(folder, config.total_steps),
        }
        self.results_file.parent.mkdir(parents=True, exist_ok=True)
        with _APPENDING, self.results_file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        shutil.rmtree(folder)
        log.unlink()
        return line

    def _known(self) -> dict[str, dict[str, Any]]:
        if not self.results_file.exists():
            return {}
        lines = (json.loads(text) for text in self.results_file.read_text().splitlines())
        return {line["key"]: {**line["result"], "commit": line["commit"]} for line in lines}

    def _config(self, run: Run) -> Config:
        return load_config(BASE, self._arguments(run))

    def _arguments(self, run: Run) -> list[str]:
        # a run that leaves steps out is another run: here it has diverged, and that is its result
        given = {"stability.non_finite": "stop", **run.overrides}
        overrides = {**given, "run.name": run.name, "run.folder": f"runs/studies/{self.name}"}
        return arguments(overrides)


def arguments(overrides: Mapping[str, Any]) -> list[str]:
    """As on the command line."""
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]


def model_of(overrides: Mapping[str, Any]) -> ModelSettings:
    """The model of ``studies/base.yaml`` with these overrides."""
    return load_config(BASE, arguments(overrides)).model


def parameters_of(overrides: Mapping[str, Any]) -> ParameterCount:
    """Its parameters, with the vocabulary of the studies."""
    return count_parameters(model_of(overrides), VOCABULARY)


def key_of(run: Run, config: Config) -> str:
    """A run's given settings and its data as one hash; settings left to their defaults may become more."""
    base = yaml.safe_load(BASE.read_text())
    data = {name: read_manifest(ROOT / source.path).identity for name, source in config.data.sources.items()}
    return hashlib.sha256(json.dumps([base, dict(run.overrides), data], sort_keys=True).encode()).hexdigest()


def outcome(folder: Path, steps: int) -> dict[str, Any]:
    """What a study keeps of a run folder: ``heldout_loss`` and ``train_loss`` (the mean of the last tenth of the steps)
    at the end, nats per token, both missing where the run diverged; ``curve``, the training loss in twenty parts; every
    ``evaluations`` line; ``shares`` of the weight that reweighting gave to each source, a mean over the steps that have
    one; ``experts``, of a model that has any what all its blocks' routing was like, a mean over the last tenth of the
    steps; ``seconds`` of all steps.
    """
    lines = read_metrics(folder)
    trained = [line for line in lines if "objective" in line]
    evaluations = [line for line in lines if "evaluation" in line]
    losses = [line["loss"] for line in trained]
    clock = ("time", "seconds", "evaluation")
    kept: dict[str, Any] = {
        "curve": _parts(losses, CURVE_POINTS),
        "evaluations": [{k: v for k, v in line.items() if k not in clock} for line in evaluations],
        "shares": _shares(trained),
        "experts": _experts(_last_tenth(trained)),
        "seconds": sum(line["step_seconds"] for line in trained),
    }
    if not trained or trained[-1]["step"] < steps:
        return kept
    if evaluations:
        kept["heldout_loss"] = evaluations[-1]["loss"]
    return {**kept, "train_loss": _mean(_last_tenth(losses))}


def _shares(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """For each source the mean of the shares in ``lines``; empty where none has any."""
    return _means(lines, "weights/share/")


def _experts(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The means of what ``lines`` say of all blocks with experts together."""
    return {name: value for name, value in _means(lines, "experts/").items() if "/" not in name}


def _means(lines: Sequence[dict[str, Any]], prefix: str) -> dict[str, float]:
    """The means of the numbers under ``prefix``, each over the lines that have it, by what follows it."""
    found: dict[str, list[float]] = {}
    for line in lines:
        for key, value in line.items():
            if key.startswith(prefix) and isinstance(value, int | float):
                found.setdefault(key.removeprefix(prefix), []).append(value)
    return {name: _mean(values) for name, values in found.items()}


def _last_tenth(values: Sequence[T]) -> Sequence[T]:
    return values[-max(1, len(values) // 10) :]


def _parts(values: Sequence[float], parts: int) -> list[float]:
    """Means over ``parts`` neighbouring shares of the values, or the values themselves where there are fewer."""
    if len(values) <= parts:
        return list(values)
    borders = [round(part * len(values) / parts) for part in range(parts + 1)]
    return [_mean(values[start:stop]) for start, stop in itertools.pairwise(borders)]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def whole_seeds(runs: Sequence[Run], results: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The results of the seeds whose runs are all known, and a sentence that names the others, empty where none is.

    Raises:
        UserError: of no seed every run is known.
    """
    wanted = Counter(run.labels["seed"] for run in runs)
    known = Counter(each["seed"] for each in results)
    whole = {seed for seed, count in wanted.items() if known[seed] == count}
    if not whole:
        raise UserError("there is nothing to report: of no seed every run is done. Run the study without --report.")
    told = [f"{seed} ({known[seed]} of {wanted[seed]} runs are known)" for seed in sorted(wanted.keys() - whole)]
    missing = f"Missing, and in no figure: seed {', '.join(told)}." if told else ""
    return [each for each in results if each["seed"] in whole], missing


def prepare_data(settings: Path = DATA) -> None:
    """Make the data set that ``settings`` describe, if it is not there: a minute."""
    output = yaml.safe_load(settings.read_text())["output"]
    if not (ROOT / output / "manifest.json").exists():
        subprocess.run([sys.executable, "-m", "data_pipeline", "prepare", str(settings)], cwd=ROOT, check=True)


def commit() -> str:
    """The commit of the code, with a plus where the tree has changes that matter to runs."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", "pretrain", "data_pipeline", "studies/*.py", "studies/*.yaml")
    return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
