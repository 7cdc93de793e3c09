"""Whole weights out of a checkpoint, on one process, by DeepSpeed's own tool."""

from __future__ import annotations

import importlib
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import Tensor

from .deepspeed_module import import_deepspeed
from .engine import TAG


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Every parameter of a checkpoint in fp32, by name, whatever ZeRO stage and number of ranks saved it.

    Stages 1 to 3 give the optimizer's copy; stage 0 what the model computed with: in bf16 the rounded values.

    Args:
        checkpoint: a complete checkpoint folder.
    """
    import_deepspeed()
    if any((checkpoint / TAG).glob("*optim_states.pt")):
        tool = importlib.import_module("deepspeed.utils.zero_to_fp32")
        with redirect_stdout(sys.stderr):  # the tool prints, and stdout belongs to the command's answer
            weights: dict[str, Tensor] = tool.get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=TAG)
        return weights
    # stage 0 shards nothing: the module lies whole in the one file
    state = torch.load(checkpoint / TAG / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    return {name: tensor.float() for name, tensor in state["module"].items()}
