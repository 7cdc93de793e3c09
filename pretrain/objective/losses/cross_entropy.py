"""The loss of a language model."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from ..base import LossSettings
from ..cross_entropy import token_cross_entropy


class CrossEntropySettings(LossSettings):
    """−log p of the label, p the softmax of the logits."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    is_likelihood: ClassVar[bool] = True

    def of_tokens(self, output: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
        return token_cross_entropy(output, labels, loss_mask)
