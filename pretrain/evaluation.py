"""Evaluation on the held-out split, by source and over all: loss, perplexity and bits per byte.

Of a run whose loss is no likelihood: its own loss, how the labels rank among all tokens, and as ``softmax_loss`` what
the softmax of the logits would give, which that run does not train. Perplexity and bits per byte are then not told.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data_pipeline import Batch, EvaluationLoader, TokenSource
from data_pipeline.damage import Damage, told_by_block

from .distributed import Distributed
from .monitor import MetricValue
from .objective import LossSettings
from .objective.cross_entropy import sequence_cross_entropy
from .unreadable import UNREADABLE, agree_on_reading

NAME = "heldout"


@dataclass(frozen=True)
class Score:
    """Sums over the evaluated labels: −log p in nats, labels, and the bytes of text that the labels stand for; and the
    sequences that were damaged, and left out where ``data.on_damage`` is ``hole``."""

    nats: float
    labels: int
    bytes: int
    holes: int = 0
    measures: Mapping[str, float] = field(default_factory=dict)
    """``LossSettings.measures``, by name; empty of a likelihood."""
    damage: str = ""
    """The damaged blocks, in words."""

    def fields(self) -> dict[str, float]:
        """The means, under the names of an evaluation line."""
        if not self.measures:
            return {"loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        means = {name: total / self.labels if self.labels else math.nan for name, total in self.measures.items()}
        return {**means, "softmax_loss": self.loss}

    @property
    def loss(self) -> float:
        """Mean −log p of a label, nats; NaN where the evaluated sequences hold no label."""
        return self.nats / self.labels if self.labels else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # exp overflows a double beyond 709

    @property
    def bits_per_byte(self) -> float:
        """−log2 p of the text over its UTF-8 bytes; the end-of-document labels count as text of 0 bytes."""
        return self.nats / math.log(2.0) / self.bytes if self.bytes else math.inf


def evaluate(
    forward: Callable[[Batch], Tensor],
    heldout: Mapping[str, TokenSource],
    piece_bytes: Tensor,
    micro_batch: int,
    sequences: int | None,
    ranks: Distributed,
    loss: LossSettings | None = None,
) -> list[Score]:
    """Score each source's held-out sequences. Collective; every rank runs the same number of forward passes.

    Args:
        forward: logits [b, T, V] of a batch on this rank's device, in evaluation mode.
        heldout: the held-out split of each source, by name.
        piece_bytes: [V] int64, UTF-8 bytes that each token stands for.
        micro_batch: sequences in a forward pass.
        sequences: how many of each source, from the first on; None takes all.
        ranks: this process among its peers.
        loss: the run's own, where it may have more to tell than −log p.

    Returns:
        one Score a source, the same on every rank.

    Raises:
        UnreadableDataError: a rank could not read all of its share; on every rank.
    """
    measures = loss.measures() if loss else {}
    sums = torch.zeros(len(heldout), 4 + len(measures), dtype=torch.float64, device=ranks.device)
    lengths = piece_bytes.to(ranks.device)
    failures: list[Exception] = []
    damage: list[list[Damage]] = []
    with torch.no_grad():  # ZeRO-3 keeps gathered parameters, which inference_mode would spoil for training
        for number, (name, source) in enumerate(heldout.items()):
            loader = EvaluationLoader(
                source,
                rank=ranks.rank,
                world_size=ranks.world_size,
                micro_batch=micro_batch,
                sequences=sequences,
                on_damage=source.on_damage,
                name=name,
            )
            for batch in _batches(loader, failures):
                batch = batch.to(ranks.device)
                logits = forward(batch)
                nats = sequence_cross_entropy(logits, batch.labels, batch.loss_mask).double().sum()
                text = (lengths[batch.labels] * batch.loss_mask).sum()
                sums[number, :3] += torch.stack([nats, batch.loss_mask.sum().double(), text.double()])
                for column, measure in enumerate(measures.values(), start=4):
                    values = measure(logits, batch.labels).masked_fill(~batch.loss_mask, 0.0)
                    sums[number, column] += values.double().sum()
            sums[number, 3] = len(loader.damage)
            damage.append(loader.damage)
    agree_on_reading(ranks, failures[0] if failures else None)
    whole = ranks.all_reduce(sums)
    of_ranks = ranks.gather_objects(damage) if whole[:, 3].any() else [damage]
    told = [told_by_block(itertools.chain.from_iterable(parts)) for parts in zip(*of_ranks, strict=True)]
    return [
        Score(nats, int(labels), int(text), int(holes), dict(zip(measures, own, strict=True)), lost)
        for (nats, labels, text, holes, *own), lost in zip(whole.tolist(), told, strict=True)
    ]


def _batches(loader: EvaluationLoader, failures: list[Exception]) -> Iterator[Batch]:
    """As many batches as every other rank has, also where this one can't read: from there on holes, and ``failures``
    has the reason; nothing more is read then."""
    left = len(loader)
    try:
        for batch in loader if not failures else ():
            left -= 1
            yield batch
    except UNREADABLE as error:
        failures.append(error)
    for _ in range(left):
        yield loader.nothing()


def evaluation_metrics(names: Sequence[str], scores: Sequence[Score]) -> dict[str, MetricValue]:
    """The fields of an evaluation line: over all labels together, and by source, if it has some left."""
    whole = Score(
        sum(s.nats for s in scores),
        sum(s.labels for s in scores),
        sum(s.bytes for s in scores),
        sum(s.holes for s in scores),
        {name: sum(s.measures[name] for s in scores) for name in scores[0].measures},
        "; ".join(s.damage for s in scores if s.damage),
    )
    fields: dict[str, MetricValue] = {"evaluation": NAME, "tokens": whole.labels, **whole.fields()}
    if whole.holes:
        fields |= {"heldout_holes": whole.holes, "heldout_damage": whole.damage}
    for name, score in zip(names, scores, strict=True):
        if score.labels:
            fields |= {f"domain_{key}/{name}": value for key, value in score.fields().items()}
    return fields
