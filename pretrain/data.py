"""What a run reads: its sources, their order and the tokenizer, opened and checked before any work (law 8)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline import Manifest, Order, OrderSource, Phase, Tokenizer, TokenSource, read_manifest
from data_pipeline.errors import UserError
from data_pipeline.files import sha256_file

from .config import Config, SourceSettings

TOKENIZER = "tokenizer.model"


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


def open_data(config: Config) -> RunData:
    """Open every source and check that the run can be fed to its end.

    Raises:
        UserError: a data set is missing or damaged, data sets were tokenised differently, the vocabulary is larger than
            the model's, or a source has too few sequences.
    """
    settings = config.data
    names = tuple(settings.sources)
    manifests = {name: read_manifest(Path(source.path)) for name, source in settings.sources.items()}
    tokenizer = _common_tokenizer(config, manifests)
    sources = tuple(
        TokenSource(Path(source.path), source.domain, "train", settings.seq_len) for source in settings.sources.values()
    )
    heldout: dict[str, TokenSource] = {}
    if config.evaluation.every_steps is not None:
        drawn = [{name: source.weight for name, source in settings.sources.items()}]
        drawn += [phase.weights for phase in settings.phases]
        for name, source in settings.sources.items():
            if any(weights[name] for weights in drawn):
                heldout[name] = _heldout(name, source, settings.seq_len)
    order = Order(
        config.run.seed,
        [
            OrderSource(name, source.sequences, settings.sources[name].weight)
            for name, source in zip(names, sources, strict=True)
        ],
        phases=[Phase(phase.start, phase.weights) for phase in settings.phases],
    )
    check_epochs(config, order, config.total_steps * config.training.global_batch)
    identity = {
        "order": order.identity(),
        "seq_len": settings.seq_len,
        "tokenizer": tokenizer.sha256,
        "data_sets": {name: manifest.identity for name, manifest in manifests.items()},
        "domains": {name: source.domain for name, source in settings.sources.items()},
    }
    return RunData(order, sources, heldout, names, tokenizer, identity)


def check_epochs(config: Config, order: Order, end_position: int) -> None:
    """Raise UserError when a source would be drawn more often than allowed before ``end_position``."""
    order.check_epochs(end_position, {name: source.max_epochs for name, source in config.data.sources.items()})


def _heldout(name: str, source: SourceSettings, seq_len: int) -> TokenSource:
    try:
        return TokenSource(Path(source.path), source.domain, "heldout", seq_len)
    except UserError as error:
        raise UserError(
            f"data.sources.{name}: {error} An evaluation needs held-out text: raise heldout_fraction when "
            "preparing, or set evaluation.every_steps=null."
        ) from error


def _common_tokenizer(config: Config, manifests: dict[str, Manifest]) -> Tokenizer:
    first = next(iter(manifests))
    hashes = {name: manifest.tokenizer_sha256 for name, manifest in manifests.items()}
    for name, digest in hashes.items():
        if digest != hashes[first]:
            raise UserError(
                f"data.sources.{name} ({config.data.sources[name].path}) was made with another tokenizer than "
                f"data.sources.{first} ({config.data.sources[first].path}): {digest[:12]} and {hashes[first][:12]}. "
                "Prepare them with one tokenizer."
            )
    path = Path(config.data.sources[first].path) / TOKENIZER
    if config.data.tokenizer is not None:
        path = Path(config.data.tokenizer)
        if not path.is_file():
            raise UserError(f"data.tokenizer = {str(path)!r} does not exist. Leave it out to take the data set's own.")
    if sha256_file(path) != hashes[first]:
        raise UserError(
            f"{path} is not the tokenizer that data.sources.{first} ({config.data.sources[first].path}) was made with: "
            f"SHA-256 {sha256_file(path)[:12]} instead of {hashes[first][:12]}. Give the data set's own "
            "tokenizer.model, or leave data.tokenizer out."
        )
    tokenizer = Tokenizer.load(path)
    config.model.resolve_vocab_size(tokenizer.vocab_size)
    return tokenizer
