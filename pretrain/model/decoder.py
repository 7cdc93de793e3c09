"""The Llama-type decoder: embedding, pre-norm blocks, final norm, head (Touvron et al. 2023, arXiv 2302.13971)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.distributed import Distributed

from .attention import Attention, document_mask
from .experts.layer import MixtureOfExperts
from .feed_forward import FeedForward
from .initialize import Draw
from .linear import make_linear
from .mup import forward_multipliers
from .norm import RMSNorm
from .recompute import ActivationCheckpointing, run_block
from .rope import Rotation, rotation
from .settings import ModelSettings


class Embedding(nn.Embedding):
    """The token table, [vocab_size, hidden_size]."""

    def __init__(self, vocab_size: int, settings: ModelSettings) -> None:
        super().__init__(vocab_size, settings.hidden_size)
        self.init_std = settings.init_std

    def reset_parameters(self) -> None:
        """Draws nothing: weights come from :mod:`.initialize`."""

    def initial_values(self, draw: Draw) -> dict[str, Tensor]:
        return {"weight": draw("weight", (self.num_embeddings, self.embedding_dim), self.init_std)}


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, name: str, settings: ModelSettings) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(settings.hidden_size, settings.norm_eps)
        self.attention = Attention(f"{name}.attention", settings)
        self.feed_forward_norm = RMSNorm(settings.hidden_size, settings.norm_eps)
        self.feed_forward = FeedForward(f"{name}.feed_forward", settings)

    def forward(self, x: Tensor, by: Rotation, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), by, mask)
        output: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return output


class ExpertBlock(nn.Module):
    """A block with a mixture of experts: x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(self, name: str, layer: int, settings: ModelSettings, across: Distributed | None) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(settings.hidden_size, settings.norm_eps)
        self.attention = Attention(f"{name}.attention", settings)
        self.feed_forward_norm = RMSNorm(settings.hidden_size, settings.norm_eps)
        self.feed_forward = MixtureOfExperts(f"{name}.feed_forward", layer, settings, across)

    def forward(
        self,
        x: Tensor,
        by: Rotation,
        mask: Tensor | None,
        counted: Tensor | None,
        noise_keys: Tensor | None,
        of_step: bool,
    ) -> tuple[Tensor, Tensor]:
        """x [b, T, d], and the sums of the routing, ``Routing.packed`` [b, ...]."""
        x = x + self.attention(self.attention_norm(x), by, mask)
        output, routing = self.feed_forward(self.feed_forward_norm(x), counted, noise_keys, of_step)
        return x + output, routing


class Outputs(NamedTuple):
    """Of a decoder's forward pass in an optimizer step."""

    logits: Tensor
    """[b, T, V], in the parameters' dtype; or, where only these were asked for, their moments [b, T, 3] in fp32."""
    routing: Tensor | None
    """``Routing.packed`` [blocks with experts, b, ...] fp32; None for a model without experts."""


class Decoder(nn.Module):
    """Tokens to logits. Parameters and buffers hold nothing until :func:`~.initialize.initialize_` or the engine fill
    them.

    Args:
        settings: the shape.
        vocab_size: rows of embedding and head (V); ``settings.resolve_vocab_size`` of the tokenizer's.
        activation_checkpointing: ``full`` keeps only the input of each block and recomputes the block in the backward
            pass: about a third more arithmetic. ``low_rank`` keeps the r-dimensional activations of factorised layers
            too.
        across: the ranks that hold the experts of every block together, an equal part each; None: all are here.
    """

    def __init__(
        self,
        settings: ModelSettings,
        vocab_size: int,
        activation_checkpointing: ActivationCheckpointing = "none",
        across: Distributed | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = settings.effective_head_dim
        self.rope_theta = settings.rope_theta
        self.tied_embeddings = settings.tied_embeddings
        self.multipliers = forward_multipliers(settings)
        self.activation_checkpointing = activation_checkpointing
        self.embedding = Embedding(vocab_size, settings)
        self.blocks = nn.ModuleList(
            ExpertBlock(f"blocks.{index}", index, settings, across)
            if settings.has_experts(index)
            else Block(f"blocks.{index}", settings)
            for index in range(settings.layers)
        )
        self.norm = RMSNorm(settings.hidden_size, settings.norm_eps)
        self.head = make_linear(settings.hidden_size, vocab_size, "head", settings)
        self._tie()

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        document_ids: Tensor,
        single_document: bool,
        counted: Tensor | None = None,
        noise_keys: Tensor | None = None,
        labels: Tensor | None = None,
        of_step: bool = False,
    ) -> Tensor | Outputs:
        """Logits [b, T, V] in the parameters' dtype; in an optimizer step :class:`Outputs`.

        Args:
            tokens: [b, T] integers below V.
            positions: [b, T] integers, the place of each token in its document.
            document_ids: [b, T] integers, equal within a document; attention does not cross from one to another.
            single_document: every row is one document, known on the host: the mask is then never made.
            counted: [b, T] bool, the tokens that the sums of the routing count and that experts with a choice of their
                own choose from; None: all.
            noise_keys: [b] int64, :func:`~.experts.noise.noise_keys`, of the routers' jitter; None: no jitter.
            labels: [b, T] integers below V: make the moments of the logits alone
                (:func:`~.linear.head.logit_moments`); None: the logits.
            of_step: of training, or of a scoring pass before it: how tokens were routed is told, and bounded by the
                experts' capacity.
        """
        x = self.embedding(tokens)
        if self.multipliers.embedding != 1.0:
            x = x * self.multipliers.embedding
        by = rotation(positions, self.head_dim, self.rope_theta, x.dtype)
        mask = None if single_document else document_mask(document_ids, x.dtype)
        routing = []
        for block in self.blocks:
            if isinstance(block, ExpertBlock):
                inputs = (by, mask, counted, noise_keys, of_step)
                x, sums = run_block(block, self.activation_checkpointing, x, *inputs)
                routing.append(sums)
            else:
                x = run_block(block, self.activation_checkpointing, x, by, mask)
        x = self.norm(x)
        if self.multipliers.head != 1.0:
            x = x * self.multipliers.head  # of the d features and not of the V logits: the same, and cheaper
        logits: Tensor = self.head(x) if labels is None else self.head(x, labels)
        if not of_step:
            return logits
        return Outputs(logits, torch.stack(routing) if routing else None)

    def _tie(self) -> None:
        if self.tied_embeddings:
            self.head.weight = self.embedding.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:
        # moving off the meta device makes a new parameter for each use of a shared one
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._tie()
        return self
