"""What a forward pass keeps for the backward pass: an estimate from the settings alone.

With s bytes for a value (2 in bf16, 4 in fp32), d = ``hidden_size``, q and k the features of all query and of all key
heads, h and h_k these heads, f = ``intermediate_size``, V = ``vocab_size``, a block keeps of each token::

    N(d) + d s                          the norm before attention, and its output, which query, key and value share
    (2 q + 2 k) s + 4 h                 attention: query, key and value rotated, its output, and its log-sum in fp32
    N(d) + d s                          the norm before the feed-forward layer, and its output
    4 f s                               gate, SiLU(gate), up, and their product
    Σ a s                               ``LinearCost.activations`` of its seven linear layers

A block with E experts of f features and K slots a token (``top_k``; E where a token may go to all) keeps, in place of
the feed-forward layer's d s and 4 f s::

    4 d                                 the router's input in fp32 (twice with jitter, which is kept too)
    8 E + 24                            logits and scores, and sums (12 E with an entropy)
    K (2 d s + 4 f s + 28)              each slot's input, gate, SiLU(gate), up, product and output; weight and places

and the feed-forward layer of its shared experts. Above, N(x) = x s + 4 is a norm's input and its reciprocal root mean
square in fp32. With QK-norm the norms of the heads keep (q + k) s + 4 (h + h_k) besides. With several documents in a
sequence and fewer key than query heads, key and value are repeated to the query heads, 2 q in place of 2 k. What only
layers without ``keeps_input`` see is not kept.

The rest, whatever the number of blocks: N(d) + d s for the final norm, 2 d_h s for the rotation, T s for the mask of a
sequence of T tokens with several documents, and at its peak 12 V for the loss: log-probabilities, their gradient and
that of the logits in fp32; with a z-loss 8 V more, the logits and a gradient in fp32. A loss of the logits' moments has
20 d in place of these, 24 d where s is 2: the features, their products and gradients in fp32; and besides, whatever the
number of tokens, up to three copies of the head's weight in fp32, which are not in the estimate.

``full`` recompute keeps d s of each block, and at any time one block's whole; ``low_rank`` keeps the inner features of
factorised layers besides (``LinearCost.products``). Not in the estimate: gradients on their way (as large as a few of a
block's values), the allocator's gaps, and what a layer makes and drops within one call.
"""

from __future__ import annotations

from typing import NamedTuple

from .count import linear_layers
from .experts.settings import ExpertsSettings
from .linear import LinearCost, block_shapes
from .recompute import ActivationCheckpointing
from .settings import ModelSettings


class ActivationBytes(NamedTuple):
    """Bytes for each token of a micro-batch."""

    blocks: int
    """Kept by all blocks from the forward to the backward pass."""
    rest: int
    """Final norm, rotation and mask."""
    loss: int
    """Logits and loss: gone when the backward pass comes to the blocks."""
    recomputed: int
    """Made again in the backward pass, of the largest block."""

    @property
    def peak(self) -> int:
        """The most that is there at any time."""
        return self.blocks + self.rest + max(self.loss, self.recomputed)


def activation_bytes(
    settings: ModelSettings,
    vocab_size: int,
    seq_len: int,
    value_bytes: int,
    recompute: ActivationCheckpointing,
    z_loss: bool = False,
    from_moments: bool = False,
    single_document: bool = False,
    fused_norms: bool = True,
) -> ActivationBytes:
    """The estimate of this module, for each token.

    Args:
        value_bytes: s, of the precision that the model computes in.
        recompute: ``training.activation_checkpointing``.
        z_loss: the objective has a term of the log-partition.
        from_moments: its loss takes the moments of the logits.
        single_document: every sequence is one document, so that no mask is made.
        fused_norms: norms are one kernel, as on GPUs; torch's for CPUs keeps 8 x + 4 bytes in place of x s + 4.
    """
    s, d = value_bytes, settings.hidden_size
    costs = [layer.cost for layer in linear_layers(settings)]
    left = iter(costs)
    blocks = [{name: next(left) for name in block_shapes(settings, layer)} for layer in range(settings.layers)]
    whole = [
        _block_bytes(settings, layer, block, s, single_document, fused_norms) for layer, block in enumerate(blocks)
    ]
    products = [sum(cost.products for cost in block.values()) * s for block in blocks]
    mask = 0 if single_document else seq_len * s
    rest = _norm_bytes(d, s, fused_norms) + d * s + 2 * settings.effective_head_dim * s + mask
    loss = vocab_size * (20 if z_loss else 12)
    if from_moments:
        loss = d * (20 if s == 4 else 24)
    if recompute == "none":
        return ActivationBytes(sum(whole), rest, loss, 0)
    inputs = settings.layers * d * s
    if recompute == "full":
        return ActivationBytes(inputs, rest, loss, max(whole))
    again = max(block - kept for block, kept in zip(whole, products, strict=True))
    return ActivationBytes(inputs + sum(products), rest, loss, again)


def _norm_bytes(size: int, s: int, fused: bool) -> int:
    return size * (s if fused else 8) + 4


def _block_bytes(
    settings: ModelSettings, layer: int, costs: dict[str, LinearCost], s: int, single: bool, fused: bool
) -> int:
    d, heads, key_heads = settings.hidden_size, settings.heads, settings.effective_kv_heads
    query, key = heads * settings.effective_head_dim, key_heads * settings.effective_head_dim

    def shared(*names: str) -> bool:
        return any(costs[name].keeps_input for name in names)

    attention = (2 * query + 2 * (key if single else query)) * s + 4 * heads
    norms = 2 * _norm_bytes(d, s, fused)
    if settings.qk_norm == "all_heads":
        norms += _norm_bytes(query, s, fused) + _norm_bytes(key, s, fused)
    elif settings.qk_norm:
        size = settings.effective_head_dim
        norms += heads * _norm_bytes(size, s, fused) + key_heads * _norm_bytes(size, s, fused)
    inputs: int = shared("attention.query", "attention.key", "attention.value")
    mixture = settings.experts if settings.has_experts(layer) else None
    name, f, inner = "feed_forward", settings.intermediate_size, 0
    if mixture is None:
        inputs += shared("feed_forward.gate", "feed_forward.up")
    else:
        name, f = "feed_forward.shared", mixture.shared * mixture.intermediate_size
        inner = _mixture_bytes(mixture, d, s)
        routed = s == 4 and not mixture.jitter  # the router keeps the norm's output itself
        inputs += routed or (mixture.shared > 0 and shared(f"{name}.gate", f"{name}.up"))
    if f:
        inner += (3 + shared(f"{name}.down")) * f * s
    return norms + inputs * d * s + attention + inner + sum(cost.activations for cost in costs.values()) * s


def _mixture_bytes(mixture: ExpertsSettings, d: int, s: int) -> int:
    """Of the routed experts and their router, but for the norm's output."""
    jitters, spread = mixture.jitter > 0, mixture.routing.kind != "top_k"
    inputs = 4 * d * ((s == 2 or jitters) + jitters)
    scores = 4 * mixture.number * (2 + (mixture.entropy is not None)) + 24
    slots = mixture.number if spread else mixture.top_k
    return inputs + scores + slots * (2 * d * s + 4 * mixture.intermediate_size * s + 28)
