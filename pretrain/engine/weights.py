"""Whole weights out of a checkpoint, on one process, by DeepSpeed's own tool."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from .deepspeed_module import import_deepspeed
from .layout import TAG


class StoredTensor(Protocol):
    """A tensor of a checkpoint that may still lie there in pieces."""

    def contiguous(self) -> Tensor:
        """The tensor, whole, on the CPU."""


def stored_weights(checkpoint: Path) -> Mapping[str, StoredTensor]:
    """Every parameter and buffer of a checkpoint by name, whatever ZeRO stage and number of ranks saved it.

    Stages 1 to 3 give the optimizer's copy in fp32; stage 0 what the model computed with: in bf16 the rounded values.
    Of a checkpoint of stage 3 the pieces stay in the files, mapped into memory, until a tensor is asked for; of the
    others the whole model is in memory once.

    Args:
        checkpoint: a complete checkpoint folder.
    """
    import_deepspeed()
    if any((checkpoint / TAG).glob("*optim_states.pt")):
        tool = importlib.import_module("deepspeed.utils.zero_to_fp32")
        with redirect_stdout(sys.stderr):  # the tool prints, and stdout belongs to the command's answer
            stored = tool.get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=TAG, lazy_mode=True)
        return cast(Mapping[str, StoredTensor], stored)
    # stage 0 shards nothing: the module lies whole in the one file
    path = checkpoint / TAG / "mp_rank_00_model_states.pt"
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    return cast(Mapping[str, StoredTensor], state["module"])


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """All of :func:`stored_weights` at once, whole; floating-point values in fp32."""
    whole = {name: stored.contiguous() for name, stored in stored_weights(checkpoint).items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in whole.items()}
