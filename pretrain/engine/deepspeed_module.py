"""DeepSpeed as a module: imported late, for it costs seconds, and made quiet."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import warnings
from typing import Any

import torch


def choose_accelerator() -> None:
    """Before whatever imports DeepSpeed, be it the objects of a checkpoint: else it says on stdout what it has chosen,
    in the midst of what a command prints there."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def import_deepspeed() -> Any:
    """DeepSpeed, quiet and without the compilation of a kernel that only its inference uses."""
    choose_accelerator()
    first = "deepspeed" not in sys.modules
    deepspeed = importlib.import_module("deepspeed")
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # `deepspeed.comm` rebinds the name `torch`, so the module has to be fetched by its full name
    # DeepSpeed still calls the collectives by the names that torch has given up
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # its bf16 optimizer prints the memory in use at every turn of its construction
    optimizer: Any = importlib.import_module("deepspeed.runtime.bf16_optimizer")
    optimizer.see_memory_usage = lambda *arguments, **options: None
    communication: Any = importlib.import_module("deepspeed.comm.torch")
    communication.build_shm_op = lambda: None
    if first:
        # its own Muon, which is not used here, is imported to ask whether an optimizer is one, and decorated to be
        # compiled: all of torch's compiler would come with that, a tenth of the 2.7 s of CPU time that imports take
        compiler: Any = importlib.import_module("deepspeed.runtime.compiler")
        compiled, compiler.compile = compiler.compile, lambda: lambda kernel: kernel
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
        compiler.compile = compiled
        # what was imported until here stays: garbage collections, an engine's own at its start among them, which would
        # take a quarter of a second to look through it, leave it out
        gc.freeze()
    return deepspeed
