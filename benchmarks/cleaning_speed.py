"""What each cleaning stage costs on one core beside SentencePiece, and what comparing documents costs.

    python benchmarks/cleaning_speed.py [--megabytes 16] [--documents 300000] [--save]

The text is Python source code in documents of at most 8,000 characters. CPU seconds are of one process, the best of
three rounds; every rule of a stage is computed, as for a document that passes them all. Decontamination is against
5,000 texts of 100 words. The comparisons between the passes run over made-up documents (random hashes, a tenth of them
repeated, a tenth nearly), in runs of 20,000.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import sentencepiece
from contest.corpus import VOCABULARY, write_text

from data_pipeline.cleaning.c4 import C4Filter, C4Settings
from data_pipeline.cleaning.decontaminate import DecontaminateSettings, Decontaminator
from data_pipeline.cleaning.near_duplicates import NearDuplicatesSettings, Signer
from data_pipeline.cleaning.normalise import Normaliser, NormaliseSettings
from data_pipeline.cleaning.quality import QualityFilter, QualitySettings
from data_pipeline.cleaning.repetition import repetition_fractions
from data_pipeline.cleaning.view import TextView
from data_pipeline.prepare import PrepareSettings, make_tokenizer
from data_pipeline.prepare.checked_files import publish_rows
from data_pipeline.prepare.duplicates import Corpus, RunFiles, band_matches, choose, exact_duplicates
from data_pipeline.prepare.runs import RUN_DTYPE
from data_pipeline.settings import build_settings
from data_pipeline.tokenizer import Tokenizer

RUN_DOCUMENTS = 20_000


def measure_stages(folder: Path, megabytes: int) -> dict[str, Any]:
    """CPU seconds per gigabyte of text of every stage and of SentencePiece, and their ratios."""
    write_text(folder / "text.jsonl", megabytes << 20)
    texts: list[str] = []
    with open(folder / "text.jsonl", encoding="utf-8") as handle:
        for line in handle:
            whole = json.loads(line)["text"]
            texts += [whole[first : first + 8000] for first in range(0, len(whole), 8000)]
    text_bytes = sum(len(text.encode()) for text in texts)
    words = [word for text in texts[:50] for word in text.split()]
    exam = "\n\n".join(" ".join(random.Random(number).choices(words, k=100)) for number in range(5000))
    (folder / "exam.txt").write_text(exam)
    quality, c4 = QualityFilter(QualitySettings()), C4Filter(C4Settings())
    decontaminate = Decontaminator(DecontaminateSettings(files=(str(folder / "exam.txt"),)))
    stages: dict[str, Callable[[str], object]] = {
        "normalise": Normaliser(NormaliseSettings()),
        "quality": lambda text: quality(TextView(text)),
        "repetition": lambda text: list(repetition_fractions(TextView(text))),
        "c4": lambda text: c4(TextView(text)),
        "decontaminate": lambda text: decontaminate(TextView(text)),
        "near_duplicates (signatures)": Signer(NearDuplicatesSettings()).sign,
    }
    for model in ("bpe", "unigram"):
        tokenizer = train(folder, model)
        stages[f"SentencePiece, {model}"] = lambda text, tokenizer=tokenizer: tokenizer.encode_batch([text])
    seconds = {
        name: best_of_three(lambda stage=stage: [stage(text) for text in texts]) for name, stage in stages.items()
    }
    return {
        name: {
            "cpu_seconds_per_gigabyte": round(spent / text_bytes * 1e9, 1),
            "of_bpe": round(spent / seconds["SentencePiece, bpe"], 3),
            "of_unigram": round(spent / seconds["SentencePiece, unigram"], 3),
        }
        for name, spent in seconds.items()
    }


def measure_comparisons(folder: Path, documents: int) -> dict[str, Any]:
    """CPU microseconds per document of each comparison, and the memory that it took (numpy's arrays and Python's)."""
    corpus = made_up(folder, documents)
    exact, near = exact_duplicates(corpus), np.zeros(0)
    found: dict[str, Any] = {}
    comparisons: dict[str, Callable[[], Any]] = {
        "exact_duplicates": lambda: exact_duplicates(corpus),
        "near_duplicates, each band": lambda: band_matches(corpus, 0, exact["document"], 0.8),
        "choosing": lambda: choose(corpus, near),
    }
    for name, compare in comparisons.items():
        seconds = best_of_three(compare)
        tracemalloc.start()
        near = compare()
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        found[name] = {
            "found": len(near),
            "cpu_microseconds_per_document": round(seconds / documents * 1e6, 2),
            "peak_memory_bytes_per_document": round(memory / documents),
        }
    return {"documents": documents, **found}


def made_up(folder: Path, documents: int) -> Corpus:
    """Runs of random documents: a tenth repeats an earlier one of its run, a tenth all but a tenth of its signature."""
    generator = np.random.default_rng(0)
    signer = Signer(NearDuplicatesSettings())
    runs: list[RunFiles] = []
    for number in range(documents // RUN_DOCUMENTS):
        table = np.zeros(RUN_DOCUMENTS, RUN_DTYPE)
        table["key"] = np.sort(generator.integers(0, 1 << 64, RUN_DOCUMENTS, np.uint64))
        table["id"] = generator.integers(0, 256, (RUN_DOCUMENTS, 16), np.uint8)
        signatures = generator.integers(0, 1 << 32, (RUN_DOCUMENTS, 128), np.uint32)
        repeats = generator.choice(np.arange(1, RUN_DOCUMENTS), RUN_DOCUMENTS // 5, replace=False)
        for place in repeats[: RUN_DOCUMENTS // 10].tolist():
            table[place] = table[place - 1]
            signatures[place] = signatures[place - 1]
        similar = repeats[RUN_DOCUMENTS // 10 :]
        signatures[similar, :116] = signatures[similar - 1, :116]
        path = folder / f"{number:06d}"
        publish_rows(Path(f"{path}.docs"), table)
        publish_rows(Path(f"{path}.minhash"), signatures)
        publish_rows(Path(f"{path}.bands"), signer.bands(signatures).reshape(-1))
        Path(f"{path}.urls").touch()
        Path(f"{path}.metadata").touch()
        runs.append(RunFiles(str(path), 0, RUN_DOCUMENTS, RUN_DOCUMENTS))
    return Corpus(runs, signer.permutations)


def train(folder: Path, model: str) -> Tokenizer:
    """A tokenizer of the contest's size, trained on the text."""
    plain = {
        "output": str(folder / model),
        "tokenizer": {"train": {"model_type": model, "vocab_size": VOCABULARY, "sample_bytes": 4 << 20}},
        "sources": {"code": {"kind": "jsonl", "files": [str(folder / "text.jsonl")], "domain": "code"}},
    }
    return make_tokenizer(build_settings(PrepareSettings, plain, "benchmark"))


def best_of_three(work: Callable[[], object]) -> float:
    """CPU seconds."""
    spent: list[float] = []
    for _ in range(3):
        clock = time.process_time()
        work()
        spent.append(time.process_time() - clock)
    return min(spent)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=16, help="of text for the stages")
    parser.add_argument("--documents", type=int, default=300_000, help="for the comparisons; 0.75 kB of disk each")
    parser.add_argument("--save", action="store_true", help="write results/cleaning_speed.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, one process",
            "python": platform.python_version(),
            "sentencepiece": sentencepiece.__version__,
            "stages": measure_stages(Path(folder), arguments.megabytes),
            "comparisons": measure_comparisons(Path(folder), arguments.documents),
        }
    print(json.dumps(result, indent=2))
    if arguments.save:
        (Path(__file__).parent / "results" / "cleaning_speed.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
