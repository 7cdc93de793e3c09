"""The main job from end to end, as `make demo` runs it: every step is a command that a user could type.

Text of the running Python's standard library -> tokenizer -> shards -> two ranks under torchrun -> a stop on request
in the middle -> the same command again, which resumes -> evaluation -> report.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
DATA, RUN = Path("data/stdlib"), Path("runs/demo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="60 steps instead of the configuration's, for CI")
    short = parser.parse_args().short
    started = time.monotonic()
    config = ROOT / "configs/demo.yaml"
    overrides = ["training.steps=60", "checkpoint.every_steps=20"] if short else []
    train = [BIN / "pretrain-launch", "local", "--ranks", 2, config, *overrides]

    run(BIN / "pretrain-data", "tokenizer", ROOT / "configs/data/stdlib.yaml")
    run(BIN / "pretrain-data", "prepare", ROOT / "configs/data/stdlib.yaml")
    run(BIN / "pretrain-data", "verify", DATA)
    run(BIN / "pretrain", "plan", config, *overrides, "--ranks", 2)
    stopped_at = train_and_stop(train, after=30 if short else 100)
    run(*train)
    run(BIN / "pretrain", "evaluate", RUN)
    run(BIN / "pretrain", "report", RUN)

    entropy = read_json(BIN / "pretrain-data", "inspect", DATA, "--entropy", "--json")["entropy"]
    baseline = entropy["heldout"]["all"]
    score = [line for line in metrics() if "evaluation" in line][-1]
    resumed = attempts()[-1]["resumed_from"]
    print(f"""
stopped on request after step {stopped_at}, resumed from {resumed}
unigram entropy of the training text      {entropy["train"]["all"]:.3f} nats/token
held-out text under these unigrams        {baseline:.3f} nats/token
held-out loss of the model                {score["loss"]:.3f} nats/token, {score["bits_per_byte"]:.3f} bits/byte
report                                    {(RUN / "report.html").resolve().as_uri()}
took                                      {time.monotonic() - started:.0f} s""")
    if resumed is None or score["loss"] > entropy["train"]["all"] - (0.2 if short else 0.8):
        sys.exit("error: the demo did not resume, or its model has not learned: look at the report")


def train_and_stop(command: list[Any], after: int) -> int:
    """Start the run, ask it to stop once ``after`` steps are done, and return the step it saved."""
    show(command)
    process = subprocess.Popen([str(part) for part in command], env=environment())
    while process.poll() is None and last_step() < after:
        time.sleep(0.2)
    if process.poll() is None:
        print(f"\n$ kill -TERM {process.pid}   # as a cluster does before it takes the machine back", flush=True)
        process.send_signal(signal.SIGTERM)
    if process.wait() != 75:
        sys.exit(f"error: the run should have stopped with exit code 75, not {process.returncode}: {attempts()[-1]}")
    return int(attempts()[-1]["last_step"])


def run(*command: Any) -> None:
    show(list(command))
    subprocess.run([str(part) for part in command], check=True, env=environment())


def read_json(*command: Any) -> Any:
    return json.loads(subprocess.run([str(part) for part in command], check=True, capture_output=True).stdout)


def show(command: list[Any]) -> None:
    words = [Path(part).name if str(part).startswith(str(BIN)) else str(part) for part in command]
    print(f"\n$ {' '.join(words)}", flush=True)


def environment() -> dict[str, str]:
    return {"OMP_NUM_THREADS": "1", **os.environ}


def lines(name: str) -> list[dict[str, Any]]:
    path = RUN / name
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def metrics() -> list[dict[str, Any]]:
    return lines("metrics.jsonl")


def attempts() -> list[dict[str, Any]]:
    """The stops and starts of the run; the last one joined with what its start said."""
    known = lines("attempts.jsonl")
    last = known[-1]
    start = next(line for line in known if line["event"] == "start" and line["attempt"] == last["attempt"])
    return [*known, {**start, **last}]


def last_step() -> int:
    try:
        return max((line["step"] for line in metrics()), default=0)
    except json.JSONDecodeError:
        return 0  # caught in the middle of a line


if __name__ == "__main__":
    main()
