"""How fast `prepare` is on one core, and how much of its time is SentencePiece's own.

    python benchmarks/prepare_speed.py [--megabytes 32] [--repeats 3] [--save]

Both passes, from JSON lines of Python source code to a complete data set with checksums, document tables and manifest,
in one process, what a start costs included (about 0.05 s, so a larger text shows a larger share). CPU seconds are of
that process, all threads; those inside SentencePiece are of the calls that encode, from `str` to one numpy array a
document: no Python lists of ids are made, neither inside nor outside.

Two models of 16,384 pieces, because SentencePiece encodes BPE (what Llama uses) about five times slower than unigram,
while the rest of `prepare` costs the same for both. Limits (exit code 1 beyond them): 90 % inside SentencePiece for
BPE. A unigram model encodes a gigabyte in some 37 s, which leaves 4 s for all else at 90 %. All else takes 5.5 to 6 s
(hashing documents and shards 1.3 s, reading and parsing lines 1.6 s, joining tokens and counting their bytes 1.0 s,
ordering, writing and reading them 1.2 s), so the limit for unigram, 83 %, guards what is reached.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sentencepiece
from contest.corpus import VOCABULARY, write_text

from data_pipeline.prepare import PrepareSettings, make_tokenizer, prepare
from data_pipeline.settings import build_settings

LEAST_SHARE = {"bpe": 0.9, "unigram": 0.83}


class EncodingClock:
    """CPU seconds of this process during calls of SentencePiece's encoder."""

    def __init__(self) -> None:
        self.seconds = 0.0
        encode = sentencepiece.SentencePieceProcessor.encode

        def timed(*arguments: Any, **options: Any) -> Any:
            begin = time.process_time()
            try:
                return encode(*arguments, **options)
            finally:
                self.seconds += time.process_time() - begin

        sentencepiece.SentencePieceProcessor.encode = timed


def settings(text: Path, output: Path, tokenizer: dict[str, Any]) -> PrepareSettings:
    plain = {
        "output": str(output),
        "tokenizer": tokenizer,
        "sources": {"code": {"kind": "jsonl", "files": [str(text)], "domain": "code"}},
        "heldout_fraction": 0.01,
        "shard_tokens": 10_000_000,
        "part_bytes": 32 << 20,
        "processes": 1,
    }
    return build_settings(PrepareSettings, plain, "benchmark")


def measure(folder: Path, text: Path, model_type: str, clock: EncodingClock, repeats: int) -> dict[str, Any]:
    training = {"train": {"model_type": model_type, "vocab_size": VOCABULARY, "sample_bytes": 4 << 20}}
    make_tokenizer(settings(text, folder / "trained", training))
    given = {"path": str(folder / "trained" / "tokenizer.model")}
    runs: list[tuple[float, float]] = []
    for number in range(repeats + 1):  # the first one warms up
        output = folder / f"set{number}"
        clock.seconds = 0.0
        begin = time.process_time()
        manifest = prepare(settings(text, output, given))
        runs.append((time.process_time() - begin, clock.seconds))
        shutil.rmtree(output)
    shutil.rmtree(folder / "trained")
    cpu, inside = sorted(runs[1:])[repeats // 2]
    tokens, text_bytes = int(manifest.shards.tokens.sum()), int(manifest.shards.text_bytes.sum())
    return {
        "tokens": tokens,
        "text_bytes": text_bytes,
        "documents": int(manifest.shards.documents.sum()),
        "cpu_seconds": round(cpu, 3),
        "cpu_seconds_all": [round(seconds, 3) for seconds, _ in runs[1:]],
        "tokens_per_second_per_core": round(tokens / cpu),
        "text_megabytes_per_second_per_core": round(text_bytes / cpu / 1e6, 2),
        "least_share_in_sentencepiece": LEAST_SHARE[model_type],
        "share_in_sentencepiece": round(statistics.median(inside / cpu for cpu, inside in runs[1:]), 4),
        "seconds_outside_sentencepiece_per_gigabyte_of_text": round((cpu - inside) / text_bytes * 1e9, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=32, help="of text")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/prepare_speed.json")
    arguments = parser.parse_args()
    clock = EncodingClock()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.jsonl"
        write_text(text, arguments.megabytes << 20)
        models = {name: measure(Path(folder), text, name, clock, arguments.repeats) for name in LEAST_SHARE}
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one process",
        "python": platform.python_version(),
        "sentencepiece": sentencepiece.__version__,
        "vocabulary": VOCABULARY,
        "models": models,
    }
    print(json.dumps(result, indent=2))
    if arguments.save:
        path = Path(__file__).parent / "results/prepare_speed.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
    slow = [name for name, least in LEAST_SHARE.items() if models[name]["share_in_sentencepiece"] < least]
    for name in slow:
        print(f"{name}: less than {LEAST_SHARE[name]:.0%} of the time is inside SentencePiece", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
