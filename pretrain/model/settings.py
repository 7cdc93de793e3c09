"""The ``model`` section of a configuration: the shape of a Llama-type decoder and its initial weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from data_pipeline.errors import UserError
from data_pipeline.settings import Settings
from pretrain.methods import choice_of

from .experts.settings import ExpertsSettings
from .linear.base import LinearSettings
from .linear.choose import check_rules
from .mup import MupSettings, check_mup

if TYPE_CHECKING:
    Linear = LinearSettings
else:
    Linear = choice_of("pretrain.model.linear.kinds", LinearSettings)


class ModelSettings(Settings):
    vocab_size: int | None = Field(default=None, ge=2)
    """Rows of the embedding and of the head; ``null`` takes the tokenizer's. May be larger than the tokenizer's, for
    example to round it up to a multiple of 128; the rows above are never looked up."""
    hidden_size: int = Field(ge=2)
    """Features of a token between the blocks (d)."""
    layers: int = Field(ge=1)
    """Decoder blocks (L)."""
    heads: int = Field(ge=1)
    """Query heads (H)."""
    kv_heads: int | None = Field(default=None, ge=1)
    """Key and value heads, each shared by ``heads / kv_heads`` query heads (arXiv 2305.13245); ``null``: ``heads``."""
    head_dim: int | None = Field(default=None, ge=2)
    """Features of a head (d_h); ``null``: ``hidden_size / heads``."""
    intermediate_size: int = Field(ge=1)
    """Features inside the feed-forward layer (d_ff); of the blocks that have no experts."""
    rope_theta: float = Field(default=10_000.0, gt=1.0, allow_inf_nan=False)
    """Base of the rotary position embedding's wavelengths: the longest is about 2 pi theta tokens."""
    norm_eps: float = Field(default=1e-5, gt=0.0, lt=1.0)
    """Added to the mean square inside every RMSNorm."""
    qk_norm: bool | Literal["all_heads"] = False
    """RMSNorm over the features of each query and key head, before the rotation (Qwen3); ``all_heads``: over those of
    all query heads together, and of all key heads (OLMoE)."""
    tied_embeddings: bool = False
    """The head uses the embedding's weight: one parameter, two uses."""
    init_std: float = Field(default=0.02, gt=0.0, allow_inf_nan=False)
    """Standard deviation of the initial weights of the embedding and of every linear layer."""
    init_scaled_residual: bool = True
    """Divide ``init_std`` by sqrt(2 layers) in the linear layers that write into the residual stream (GPT-2)."""
    weights_from: str | None = None
    """Start with these weights instead of drawing them: a checkpoint (a ``step_...`` folder), or a folder that
    transformers or ``pretrain export`` wrote, with a Llama, Mistral, Qwen3, Mixtral, OLMoE or Qwen3-MoE model in
    safetensors. Read once, when the run begins; a resumed run has its own."""
    experts: ExpertsSettings | None = None
    """Mixtures of experts in place of feed-forward layers; ``null``: every block has a feed-forward layer."""
    linear: tuple[Linear, ...] = ()
    """Which parameterization the linear layers of the blocks have; those that no rule matches are dense, as is the
    head. No layer may be matched twice."""
    mup: MupSettings | None = None
    """muP: scale initial weights, learning rates and multipliers with the width, so that hyperparameters tuned at a
    base shape hold; ``null``: the standard parametrisation."""

    @model_validator(mode="after")
    def _check(self) -> ModelSettings:
        if self.head_dim is None and self.hidden_size % self.heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}; change one of them or give "
                "head_dim"
            )
        if self.heads % self.effective_kv_heads:
            raise ValueError(
                f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}: every key-value head serves the "
                "same number of query heads"
            )
        if self.effective_head_dim % 2:
            raise ValueError(
                f"head_dim {self.effective_head_dim} is odd, but the rotary embedding rotates pairs of features; make "
                f"it even{'' if self.head_dim else ' (it is hidden_size / heads)'}"
            )
        if self.experts and not any(map(self.has_experts, range(self.layers))):
            raise ValueError(
                f"experts.dense_first {self.experts.dense_first} leaves none of the {self.layers} layers for experts; "
                "lower it, or leave experts out"
            )
        check_rules(self)
        check_mup(self)
        return self

    @property
    def effective_kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def effective_head_dim(self) -> int:
        return self.hidden_size // self.heads if self.head_dim is None else self.head_dim

    def has_experts(self, layer: int) -> bool:
        """Whether block ``layer`` (from 0) has a mixture of experts."""
        return self.experts is not None and self.experts.in_block(layer)

    @property
    def expert_layers(self) -> list[int]:
        """The blocks that have experts, ascending."""
        return [layer for layer in range(self.layers) if self.has_experts(layer)]

    def resolve_vocab_size(self, tokenizer_vocab_size: int) -> int:
        """The rows of the embedding for data of this tokenizer.

        Raises:
            UserError: ``vocab_size`` is given and smaller than the tokenizer's, so that some tokens had no row.
        """
        if self.vocab_size is None:
            return tokenizer_vocab_size
        if self.vocab_size < tokenizer_vocab_size:
            raise UserError(
                f"model.vocab_size is {self.vocab_size}, but the data's tokenizer has {tokenizer_vocab_size} tokens. "
                f"Leave model.vocab_size out, or set it to {tokenizer_vocab_size} or more."
            )
        return self.vocab_size
