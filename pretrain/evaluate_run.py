"""``pretrain evaluate``: score a checkpoint of a run in one process, without the engine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline import Batch
from data_pipeline.errors import UserError

from .checkpoint import complete_checkpoints, intact, read_state
from .config import load_config
from .data import open_data
from .distributed import Distributed
from .engine.weights import load_weights
from .evaluation import evaluate, evaluation_metrics
from .model import Decoder
from .run_folder import CHECKPOINTS, CONFIG_FILE


def evaluate_run(run: Path, checkpoint: Path | None, sequences: int | None) -> dict[str, Any]:
    """The evaluation line (as in metrics.jsonl) of a checkpoint.

    Args:
        run: the run folder; its config.yaml says what the model and the data are.
        checkpoint: a ``step_...`` folder; None takes the run's newest complete one.
        sequences: of each source's held-out split; None takes all.

    Raises:
        UserError: no such run or checkpoint, or the data it names is gone.
        DataError: the checkpoint is damaged.
    """
    if not (run / CONFIG_FILE).is_file():
        raise UserError(f"{run} is no run folder: it has no {CONFIG_FILE}. Give the folder that holds checkpoints/.")
    config = load_config(run / CONFIG_FILE)
    if config.evaluation.every_steps is None:
        raise UserError(f"{run} has evaluation.every_steps = null, so it names no held-out data to evaluate on.")
    if checkpoint is None:
        complete = complete_checkpoints(run / CHECKPOINTS)
        if not complete:
            raise UserError(f"{run / CHECKPOINTS} holds no complete checkpoint. Train first, or give --checkpoint.")
        checkpoint = complete[-1]
    intact(checkpoint)
    started = time.perf_counter()
    data = open_data(config)
    state = read_state(checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Decoder(config.model, config.model.resolve_vocab_size(data.tokenizer.vocab_size))
    weights = load_weights(checkpoint)
    if config.model.tied_embeddings:
        weights.setdefault("head.weight", weights["embedding.weight"])
    model.load_state_dict(weights)
    model = model.to(device, torch.bfloat16 if config.training.precision == "bf16" else torch.float32).eval()

    def forward(batch: Batch) -> Tensor:
        logits: Tensor = model(batch.tokens, batch.positions, batch.document_ids, batch.single_document)
        return logits

    pieces = torch.from_numpy(data.tokenizer.piece_bytes)
    alone = Distributed(rank=0, world_size=1, device=device)
    micro_batch = config.training.micro_batch
    scores = evaluate(forward, data.heldout, pieces, micro_batch, sequences, alone, config.objective.loss)
    where = {"step": state["step"], "position": state["position"], "checkpoint": str(checkpoint)}
    return {**evaluation_metrics(list(data.heldout), scores), **where, "seconds": time.perf_counter() - started}
