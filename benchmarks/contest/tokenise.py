"""One way from JSON lines to tokens on the disk, in a process of its own on one core: prints one JSON object.

    python -m contest.tokenise headrace|datasets|datatrove|sentencepiece TEXT MODEL OUTPUT

- ``headrace``: `prepare`: tokenise, check, hash, shuffle, cut into blocks with checksums, write tars and manifest.
- ``datasets``: ``load_dataset("json")`` and ``map`` with the SentencePiece model, tokens into Arrow; no shuffle.
- ``datatrove``: reader, ``DocumentTokenizer`` (Rust ``tokenizers``, the same vocabulary and merges) and merger, which
  shuffle documents.
- ``sentencepiece``: nothing but the model's ``encode`` on texts in memory: the floor under the first two.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}


def headrace(text: Path, model: Path, output: Path) -> dict[str, Any]:
    """Also the share of CPU time spent inside SentencePiece."""
    from prepare_speed import EncodingClock

    from data_pipeline.prepare import prepare

    from .corpus import prepare_settings

    inside = EncodingClock()
    settings = prepare_settings(text, output, model, processes=1)
    stop = _clock()
    shards = prepare(settings).shards
    times = stop()
    return {**times, "tokens": int(shards.tokens.sum()), "share_inside_sentencepiece": inside.seconds / times["cpu"]}


def datasets(text: Path, model: Path, output: Path) -> dict[str, Any]:
    """Tokens and their EOS, uint16."""
    import datasets as library
    import numpy as np
    from sentencepiece import SentencePieceProcessor

    library.disable_progress_bars()
    processor = SentencePieceProcessor(model_file=str(model))
    eos = np.array([processor.eos_id()], np.int32)

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        encoded = processor.encode(batch["text"], out_type="numpy", num_threads=1)
        return {"tokens": [np.concatenate([ids, eos]).astype(np.uint16) for ids in encoded]}

    features = library.Features({"tokens": library.List(library.Value("uint16"))})
    stop = _clock()
    loaded = library.load_dataset("json", data_files=str(text), split="train", cache_dir=str(output))
    mapped = loaded.map(encode, batched=True, batch_size=100, remove_columns=loaded.column_names, features=features)
    times = stop()
    return {**times, "tokens": sum(len(chunk.values) for chunk in mapped.data["tokens"].chunks)}


def datatrove(text: Path, model: Path, output: Path) -> dict[str, Any]:
    """Two steps, as its examples have them; no worker processes."""
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer, DocumentTokenizerMerger
    from loguru import logger

    from .tokenizer_json import write_tokenizer_json

    logger.remove()
    converted = output / "tokenizer.json"
    output.mkdir(parents=True)
    eos = write_tokenizer_json(model, converted)
    reader = JsonlReader(str(text.parent), glob_pattern=text.name, doc_progress=False)
    tokenizer = DocumentTokenizer(str(output / "parts"), tokenizer_name_or_path=str(converted), eos_token=eos, seed=0)
    merger = DocumentTokenizerMerger(str(output / "parts"), str(output / "merged"), "text", seed=0, progress=False)
    stop = _clock()
    documents: Any = None
    for step in (reader, tokenizer):
        documents = step(documents, rank=0, world_size=1)
    for _ in documents or ():
        pass
    merger(None, rank=0, world_size=1)
    times = stop()
    tokens = sum(path.stat().st_size for path in (output / "merged").glob("*.ds")) // 2
    return {**times, "tokens": tokens}


def sentencepiece(text: Path, model: Path, output: Path) -> dict[str, Any]:
    """Batches of about 1 MB of text; counts one EOS a document, as the others do."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(model))
    with open(text, encoding="utf-8") as lines:
        batches = list(_batches(json.loads(line)["text"] for line in lines))
    stop = _clock()
    tokens = sum(len(ids) + 1 for batch in batches for ids in processor.encode(batch, out_type="numpy", num_threads=1))
    return {**stop(), "tokens": tokens}


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    def number_of_batch() -> Iterator[tuple[int, str]]:
        seen = 0
        for text in texts:
            yield seen >> 20, text
            seen += len(text)

    for _, batch in itertools.groupby(number_of_batch(), lambda pair: pair[0]):
        yield [text for _, text in batch]


def _clock() -> Any:
    began, began_cpu = time.perf_counter(), time.process_time()
    return lambda: {"wall": time.perf_counter() - began, "cpu": time.process_time() - began_cpu}


def main() -> None:
    """Run the named way."""
    name, *paths = sys.argv[1:]
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries talk
    ways = {"headrace": headrace, "datasets": datasets, "datatrove": datatrove, "sentencepiece": sentencepiece}
    print(json.dumps(ways[name](*map(Path, paths))), file=answers)


if __name__ == "__main__":
    main()
