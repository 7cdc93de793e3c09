"""The configuration of `pretrain-data tokenizer` and `pretrain-data prepare`: one file for both."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from ..cleaning import CleaningSettings
from ..layout import nearest_divisors
from ..settings import Settings
from ..sources import AnySource
from ..sources.inputs import shown_name
from ..storage import AccessSettings, StorageSettings


class TokenizerTraining(Settings):
    """How to train a SentencePiece model on the sources."""

    model_type: Literal["unigram", "bpe"] = Field(default="unigram", description="The segmentation model.")
    vocab_size: int = Field(
        ge=300, description="Pieces, among them 4 control pieces and the 256 bytes. Tokens take 2 bytes up to 65,536."
    )
    character_coverage: float = Field(
        default=0.9995, ge=0.98, le=1, description="Fraction of the sample's characters that get a piece of their own."
    )
    split_digits: bool = Field(default=False, description="Make every decimal digit a token of its own.")
    sample_bytes: int = Field(
        default=64 << 20,
        gt=0,
        description="Bytes of text to train on, taken from all sources in proportion to their input bytes, never from "
        "held-out documents. Training needs about 30 times as much memory.",
    )


class TokenizerSettings(Settings):
    """The tokenizer: exactly one of the two."""

    path: str | None = Field(default=None, description="A SentencePiece .model file to take.")
    train: TokenizerTraining | None = Field(default=None, description="Train one.")

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizerSettings:
        if (self.path is None) == (self.train is None):
            raise ValueError("give exactly one of tokenizer.path and tokenizer.train")
        return self


class PrepareSettings(AccessSettings):
    """From text to a data set folder; `secure` and `remote` say how remote input is read."""

    output: str = Field(min_length=1, description="The data set folder; made if missing.")
    seed: int = Field(
        default=0, ge=0, lt=1 << 64, description="Of the shuffle. The held-out split does not hang on it."
    )
    tokenizer: TokenizerSettings
    sources: dict[str, AnySource] = Field(min_length=1, description="Where the text comes from, by a name of your own.")
    cleaning: CleaningSettings = Field(
        default_factory=CleaningSettings, description="What is done to the text on the way; by default nothing."
    )
    heldout_fraction: float = Field(
        default=0.01,
        ge=0,
        lt=1,
        description="Fraction of documents kept out of training, decided by each document's content hash alone, so "
        "equal documents never fall on both sides.",
    )
    block_tokens: int = Field(
        default=65_536, ge=2, description="Tokens per block: the unit of checksums. A sequence length must divide it."
    )
    shard_tokens: int = Field(
        default=100_000_000, gt=0, description="Tokens per shard, about; the shards come out even."
    )
    packing: Literal["concat", "best_fit"] = Field(
        default="concat",
        description="`concat`: documents end to end, cut wherever a sequence ends. `best_fit`: rows of pack_tokens in "
        "which no document is cut that fits into one, filled up with EOS.",
    )
    pack_tokens: int | None = Field(
        default=None,
        ge=2,
        description="Tokens per row of best_fit packing: the sequence length of the runs. Must divide block_tokens.",
    )
    part_bytes: int = Field(
        default=64 << 20,
        gt=0,
        description="Input bytes per part of the first pass: what one process does in one go, holds in memory and, "
        "when killed, loses. Every shard reads a piece of every part, so for thousands of shards give 1 GB or more. "
        "Does not change the data set.",
    )
    processes: int | None = Field(
        default=None, gt=0, description="Worker processes; unset: as many as cores. Does not change the data set."
    )

    @model_validator(mode="after")
    def _block_numbers_fit(self) -> PrepareSettings:
        if self.shard_tokens > 500_000 * self.block_tokens:
            raise ValueError(
                f"shard_tokens {self.shard_tokens} is over 500,000 blocks of block_tokens {self.block_tokens}: block "
                "numbers have six digits. Make block_tokens larger or shard_tokens smaller"
            )
        return self

    @model_validator(mode="after")
    def _rows_fit(self) -> PrepareSettings:
        if self.packing == "concat":
            if self.pack_tokens is not None:
                raise ValueError(
                    f"pack_tokens = {self.pack_tokens} says nothing with packing: concat. Set packing: best_fit, or "
                    "leave pack_tokens out"
                )
        elif self.pack_tokens is None:
            raise ValueError("packing: best_fit needs pack_tokens, the sequence length of the runs")
        elif self.block_tokens % self.pack_tokens:
            raise ValueError(
                f"pack_tokens {self.pack_tokens} does not divide block_tokens {self.block_tokens}; the nearest that do "
                f"are {nearest_divisors(self.block_tokens, self.pack_tokens)}"
            )
        return self

    @property
    def storage(self) -> StorageSettings:
        """How remote input is read, alone; it is read once, so nothing of it is cached."""
        return StorageSettings(secure=self.secure, remote=self.remote)

    @property
    def passes(self) -> int:
        """How often the tasks of a shared `prepare` must be started, each time when all of the time before are done."""
        cleaning = self.cleaning
        comparisons = cleaning.exact_duplicates + (cleaning.near_duplicates is not None)
        return 2 + comparisons + (comparisons > 0)

    @property
    def agreed(self) -> dict[str, Any]:
        """What must stay as it was when a killed prepare continues: the content, without what may be done about bad
        records, for parts that are finished hold none or have left them out already."""
        content = self.content
        for source in content["sources"].values():
            del source["on_bad_record"]
        return content

    @property
    def content(self) -> dict[str, Any]:
        """The settings that decide what the data set holds (JSON); addresses without login and query."""
        content = self.model_dump(
            mode="json", exclude={"output", "part_bytes", "processes", *AccessSettings.model_fields}
        )
        for source in content["sources"].values():
            if "files" in source:
                source["files"] = [shown_name(name) for name in source["files"]]
        # JSON objects have no order; parts are numbered in this one, and of duplicates the source named first wins
        content["source_order"] = list(self.sources)
        return content
