"""Text to tokens on the disk: our `prepare` against others, one process each, on one core, in turns."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from .corpus import Corpus
from .environments import BENCHMARKS, interpreter

WAYS = {"headrace": None, "datasets": "peers", "datatrove": "peers", "sentencepiece": None}


def measure_prepare(corpus: Corpus, folder: Path, text_bytes: int, rounds: int) -> dict[str, Any]:
    """Tokens per second and core of every way over the first ``text_bytes`` of the corpus, medians over the rounds."""
    text = folder / "prepare.jsonl"
    _take(corpus.text, text, text_bytes)
    model = corpus.dataset / "tokenizer.model"
    figures: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way, environment in WAYS.items():
            python = sys.executable if environment is None else interpreter(environment)
            output = folder / f"prepared_by_{way}"
            shutil.rmtree(output, ignore_errors=True)
            with open(folder / f"prepare_{way}.log", "ab") as log:
                done = subprocess.run(
                    [python, "-m", "contest.tokenise", way, text, model, output],
                    cwd=BENCHMARKS,
                    env={**os.environ, "HF_DATASETS_OFFLINE": "1"},
                    check=True,
                    stdout=subprocess.PIPE,
                    stderr=log,
                )
            figures[way].append(json.loads(done.stdout))
            shutil.rmtree(output, ignore_errors=True)
        print(f"prepare: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    rows = {
        way: {
            "tokens": int(ours[0]["tokens"]),
            "tokens_per_cpu_second": statistics.median(one["tokens"] / one["cpu"] for one in ours),
            "tokens_per_wall_second": statistics.median(one["tokens"] / one["wall"] for one in ours),
        }
        for way, ours in figures.items()
    }
    ours = rows["headrace"]["tokens_per_cpu_second"]
    return {
        "text_bytes": text.stat().st_size,
        "rounds": rounds,
        "rows": rows,
        "ratios": {way: ours / row["tokens_per_cpu_second"] for way, row in rows.items() if way != "headrace"},
        "share_inside_sentencepiece": statistics.median(
            one["share_inside_sentencepiece"] for one in figures["headrace"]
        ),
    }


def _take(source: Path, target: Path, text_bytes: int) -> None:
    with open(source, "rb") as lines, open(target, "wb") as out:
        for line in lines:
            out.write(line)
            if out.tell() >= text_bytes:
                return
