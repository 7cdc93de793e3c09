"""``pretrain export``: a checkpoint as a folder that `transformers` loads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from data_pipeline import Tokenizer
from data_pipeline.errors import UserError
from pretrain.checkpoint import complete_checkpoints
from pretrain.data import tokenizer_model
from pretrain.initial_weights import CheckpointWeights
from pretrain.run_folder import CHECKPOINTS, CONFIG_FILE

from .architecture import to_config
from .layouts import choose_layout
from .names import LayoutName
from .plan import ExportPlan
from .tokenizer_files import tokenizer_files
from .write import published, write_tensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODELING = "modeling_headrace.py"


class Export(NamedTuple):
    """What was written."""

    checkpoint: str
    output: str
    architecture: str
    dtype: str
    parameters: int
    bytes: int
    """Of all tensors."""
    merged_layers: int
    """Linear layers of several parts that became one dense weight."""
    custom_layers: int
    """Linear layers that ``modeling_headrace.py`` computes."""


def export_checkpoint(
    source: Path,
    output: Path,
    *,
    layout: LayoutName | None = None,
    dtype: Literal["fp32", "bf16"] = "fp32",
    unmerged: bool = False,
    tokenizer: Path | Literal["data", "none"] = "data",
    max_shard_size: str = "5GB",
) -> Export:
    """Write the weights of a checkpoint, with configuration and tokenizer, as transformers reads them.

    The model computes the same there: muP's multipliers and what scales routed experts are multiplied into weights, and
    a linear layer of several parts becomes a dense one where no activation stands between them.

    Args:
        source: a ``step_...`` folder, or a run folder, whose newest complete checkpoint is taken.
        output: a folder that does not exist yet, or an empty one.
        layout: the ``model_type`` that it shall be; None: the first that can say what the model computes.
        dtype: of the parameters.
        unmerged: keep the parts of linear layers; to load them then takes ``trust_remote_code=True``.
        tokenizer: a SentencePiece model; ``data``: that of the run's data sets; ``none``: write none.
        max_shard_size: of a file of weights, as ``5GB``.

    Raises:
        UserError: there is no such checkpoint, no layout (or not this one) can say what its model computes, ``output``
            is taken, or the tokenizer is not to be had.
        DataError: the checkpoint is damaged.
    """
    weights = CheckpointWeights(_checkpoint_of(source))
    chosen = choose_layout(weights.settings, layout)
    plan = ExportPlan(weights, DTYPES[dtype], unmerged, chosen)
    context: int = weights.config.data.seq_len
    stored = str(DTYPES[dtype]).removeprefix("torch.")
    config = to_config(weights.settings, chosen, weights.vocab_size, context, stored)
    files: dict[str, bytes] = {}
    special: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer != "none":
        found = _tokenizer(weights, tokenizer)
        files = tokenizer_files(found, context)
        special |= {"eos_token_id": found.eos_id, "pad_token_id": found.pad_id}
    if plan.custom:
        files[MODELING] = Path(__file__).with_name(MODELING).read_bytes()
    files["config.json"] = _json(config | plan.additions() | special)
    files["generation_config.json"] = _json(special)
    with published(output) as draft:
        for name, content in files.items():
            (draft / name).write_bytes(content)
        size = write_tensors(draft, plan.tensors, max_shard_size)
    return Export(
        checkpoint=str(weights.path),
        output=str(output),
        architecture=(config | plan.additions())["architectures"][0],
        dtype=dtype,
        parameters=sum(math.prod(each.shape) for each in plan.tensors.values() if each.dtype.is_floating_point),
        bytes=size,
        merged_layers=plan.merged,
        custom_layers=len(plan.custom),
    )


def show_export(written: Export) -> str:
    """What was written, for people."""
    lines = [
        f"checkpoint    {written.checkpoint}",
        f"written       {written.output}: {written.architecture}, {written.parameters:,} parameters, "
        f"{written.bytes:,} bytes in {written.dtype}",
    ]
    if written.merged_layers:
        lines.append(f"merged        {written.merged_layers:,} linear layers of several parts into dense ones")
    if written.custom_layers:
        lines.append(f"custom        {written.custom_layers:,} linear layers: load with trust_remote_code=True")
    return "\n".join(lines)


def _checkpoint_of(source: Path) -> Path:
    if not (source / CONFIG_FILE).is_file():
        return source
    complete = complete_checkpoints(source / CHECKPOINTS)
    if not complete:
        raise UserError(f"{source / CHECKPOINTS} holds no complete checkpoint. Train first, or name a step_... folder.")
    return complete[-1]


def _tokenizer(weights: CheckpointWeights, given: Path | Literal["data"]) -> Tokenizer:
    """The tokenizer that the checkpoint was trained with. Raises UserError where it is not to be had."""
    settings = weights.config.data
    if given == "data":
        try:
            model, origin = tokenizer_model(settings, next(iter(settings.sources.values())).path)
        except UserError as error:
            raise UserError(
                f"the tokenizer of {weights.path} is not to be had: {error} Give its SentencePiece model by "
                "--tokenizer, or leave it out by --no-tokenizer."
            ) from error
        tokenizer = Tokenizer(model, origin)
    else:
        tokenizer, origin = Tokenizer.load(given), str(given)
    if tokenizer.sha256 != weights.tokenizer_sha256:
        raise UserError(
            f"{origin} is not the tokenizer that {weights.path} was trained with: SHA-256 {tokenizer.sha256[:12]} "
            f"instead of {weights.tokenizer_sha256[:12]}. Give that one by --tokenizer, or leave it out by "
            "--no-tokenizer."
        )
    return tokenizer


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
