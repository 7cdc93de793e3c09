"""Evaluation on the held-out split: loss, perplexity and bits per byte, by source and over all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline import Batch, EvaluationLoader, TokenSource

from .distributed import Distributed
from .monitor import MetricValue
from .objective.cross_entropy import sequence_cross_entropy

NAME = "heldout"


@dataclass(frozen=True)
class Score:
    """Sums over the evaluated labels: −log p in nats, labels, and the bytes of text that the labels stand for; and the
    sequences that were damaged, and left out where ``data.on_damage`` is ``hole``."""

    nats: float
    labels: int
    bytes: int
    holes: int = 0

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
    heldout: Sequence[TokenSource],
    piece_bytes: Tensor,
    micro_batch: int,
    sequences: int | None,
    ranks: Distributed,
) -> list[Score]:
    """Score each source's held-out sequences. Collective; every rank runs the same number of forward passes.

    Args:
        forward: logits [b, T, V] of a batch on this rank's device, in evaluation mode.
        heldout: the held-out split of each source.
        piece_bytes: [V] int64, UTF-8 bytes that each token stands for.
        micro_batch: sequences in a forward pass.
        sequences: how many of each source, from the first on; None takes all.
        ranks: this process among its peers.

    Returns:
        one Score a source, the same on every rank.
    """
    sums = torch.zeros(len(heldout), 4, dtype=torch.float64, device=ranks.device)
    lengths = piece_bytes.to(ranks.device)
    with torch.no_grad():  # ZeRO-3 keeps gathered parameters, which inference_mode would spoil for training
        for number, source in enumerate(heldout):
            loader = EvaluationLoader(
                source,
                rank=ranks.rank,
                world_size=ranks.world_size,
                micro_batch=micro_batch,
                sequences=sequences,
                on_damage=source.on_damage,
            )
            for batch in loader:
                batch = batch.to(ranks.device)
                nats = sequence_cross_entropy(forward(batch), batch.labels, batch.loss_mask).double().sum()
                text = (lengths[batch.labels] * batch.loss_mask).sum()
                sums[number, :3] += torch.stack([nats, batch.loss_mask.sum().double(), text.double()])
            sums[number, 3] = len(loader.damage)
    return [
        Score(nats, int(labels), int(text), int(holes)) for nats, labels, text, holes in ranks.all_reduce(sums).tolist()
    ]


def evaluation_metrics(names: Sequence[str], scores: Sequence[Score]) -> dict[str, MetricValue]:
    """The fields of an evaluation line: over all labels together, and by source."""
    whole = Score(
        sum(s.nats for s in scores),
        sum(s.labels for s in scores),
        sum(s.bytes for s in scores),
        sum(s.holes for s in scores),
    )
    fields: dict[str, MetricValue] = {
        "evaluation": NAME,
        "tokens": whole.labels,
        "loss": whole.loss,
        "perplexity": whole.perplexity,
        "bits_per_byte": whole.bits_per_byte,
    }
    if whole.holes:
        fields["holes"] = whole.holes
    for name, score in zip(names, scores, strict=True):
        fields[f"domain_loss/{name}"] = score.loss
        fields[f"domain_perplexity/{name}"] = score.perplexity
        fields[f"domain_bits_per_byte/{name}"] = score.bits_per_byte
    return fields
