"""What a run reads: its sources, their order and the tokenizer, opened and checked before any work (law 8)."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline import Order, Tokenizer, TokenSource
from data_pipeline.errors import UserError
from data_pipeline.history import Stretch
from data_pipeline.layout import TOKENIZER_FILE
from data_pipeline.manifest import HELDOUT
from data_pipeline.storage import open_store
from data_pipeline.stream import Stream, StreamSettings, open_split, open_stream

from .config import Config, DataSettings


@dataclass(frozen=True)
class RunData:
    """The opened data of a run; the same on every rank."""

    order: Order
    sources: tuple[TokenSource, ...]
    """The training split, in the order of the configuration; ``names`` are theirs."""
    heldout: dict[str, TokenSource]
    """The held-out split of each source that is ever drawn, by name; empty where no evaluation is asked for."""
    names: tuple[str, ...]
    tokenizer: Tokenizer
    identity: dict[str, Any]
    """What a resumed run must find unchanged: the order, and each source's data set and tokenizer."""


def open_data(config: Config, share: tuple[int, int] = (0, 1)) -> RunData:
    """Open every source. Whether they last is another question: :func:`check_end`.

    Args:
        config: the run's configuration.
        share: (rank, ranks): which part of the shards this process looks for.

    Raises:
        UserError: a data set is missing or damaged, data sets were tokenised differently, or the vocabulary is larger
            than the model's.
    """
    settings = config.data
    stream = open_stream(settings, config.run.seed, share, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    tokenizer = _common_tokenizer(config, stream)
    heldout: dict[str, TokenSource] = {}
    if config.evaluation.every_steps is not None:
        drawn = [{name: source.weight for name, source in settings.sources.items()}]
        drawn += [phase.weights for phase in settings.phases]
        for name in stream.names:
            if any(weights[name] for weights in drawn):
                heldout[name] = open_split(settings, name, HELDOUT, share)
    identity = {
        "order": stream.order.identity(),
        "seq_len": settings.seq_len,
        "tokenizer": tokenizer.sha256,
        "data_sets": {
            name: source.manifest.identity for name, source in zip(stream.names, stream.sources, strict=True)
        },
        "domains": {name: source.domain for name, source in settings.sources.items()},
    }
    return RunData(stream.order, stream.sources, heldout, stream.names, tokenizer, identity)


def check_end(config: Config, order: Order, end: int) -> None:
    """Check the run's settings of data against the position at which it will be done.

    Raises:
        UserError: a source would be drawn more often than allowed; a phase or a skipped range begins after the end.
    """
    order.check_epochs(end, {name: source.max_epochs for name, source in config.data.sources.items()})
    for start, stop in config.data.skip_ranges:
        if start >= end:
            raise UserError(
                f"data.skip_ranges: the range ({start}, {stop}) begins after the run's end at position {end}, so it "
                "leaves nothing out. Take it away."
            )
    for phase in config.data.phases:
        if phase.start >= end:
            raise UserError(
                f"data.phases: the phase at position {phase.start} begins after the run's end at {end} "
                f"({config.total_steps} steps of {config.training.global_batch} sequences). Leave it out."
            )


def stretch_of_run(config: Config, data: RunData, step: int, position: int, world_size: int) -> Stretch:
    """What this attempt reads from ``step`` on, for the run folder's data.json."""
    plan = config.batch_plan
    stream = config.data.model_dump(include=set(StreamSettings.model_fields))
    return Stretch(
        first_step=step,
        first_position=position,
        end_step=config.total_steps,
        world_size=world_size,
        micro_batch=config.training.micro_batch,
        global_batch=plan.global_batch,
        ramp=plan.ramp,
        skip_ranges=plan.skip_ranges,
        seed=config.run.seed,
        stream=StreamSettings.model_validate(stream),
        data_sets=data.identity["data_sets"],
    )


def _common_tokenizer(config: Config, stream: Stream) -> Tokenizer:
    settings, first = config.data, stream.names[0]
    paths = {name: source.path for name, source in settings.sources.items()}
    hashes = {name: source.manifest.tokenizer_sha256 for name, source in zip(stream.names, stream.sources, strict=True)}
    for name, digest in hashes.items():
        if digest != hashes[first]:
            raise UserError(
                f"data.sources.{name} ({paths[name]}) was made with another tokenizer than data.sources.{first} "
                f"({paths[first]}): {digest[:12]} and {hashes[first][:12]}. Prepare them with one tokenizer."
            )
    model, origin = tokenizer_model(settings, paths[first])
    if (found := hashlib.sha256(model).hexdigest()) != hashes[first]:
        raise UserError(
            f"{origin} is not the tokenizer that data.sources.{first} ({paths[first]}) was made with: SHA-256 "
            f"{found[:12]} instead of {hashes[first][:12]}. Give the data set's own tokenizer.model, or leave "
            "data.tokenizer out."
        )
    tokenizer = Tokenizer(model, origin)
    config.model.resolve_vocab_size(tokenizer.vocab_size)
    return tokenizer


def tokenizer_model(settings: DataSettings, root: str) -> tuple[bytes, str]:
    """The bytes of the SentencePiece model, and where they come from: ``root`` is a data set's.

    Raises:
        UserError: there is no such file.
    """
    if settings.tokenizer is None:
        return open_store(root, settings).read(TOKENIZER_FILE), f"{root}/{TOKENIZER_FILE}"
    path = Path(settings.tokenizer)
    if not path.is_file():
        raise UserError(f"data.tokenizer = {str(path)!r} does not exist. Leave it out to take the data set's own.")
    return path.read_bytes(), str(path)
