"""What expert parallelism costs, by arithmetic: for ``pretrain plan``."""

from __future__ import annotations

from typing import Any

from .config import Config
from .engine import accumulation_steps


def expert_communication(config: Config, ranks: int) -> dict[str, Any] | None:
    """The exchange of tokens in an optimizer step of a run on ``ranks`` ranks; None where experts are not divided.

    Each block with experts sends the rows of a micro-batch to their experts and back, in the forward pass, its
    recomputation and the backward pass, and before each of the first two how many rows go where. A scoring pass, where
    the objective makes one, is one more forward pass.

    Returns:
        ``ranks`` that share a block's experts and ``experts_of_a_rank``; ``all_to_alls`` of rows and of ``counts`` in a
        step, and ``scoring_all_to_alls`` of rows that a scoring pass adds; ``bytes`` of rows that leave a rank in a
        step, and in a scoring pass, when all experts have equally many of ``top_k`` slots a token.
    """
    mixture, size = config.model.experts, config.engine.expert_parallel
    if mixture is None or size == 1:
        return None
    forward = len(config.model.expert_layers) * accumulation_steps(config, ranks)[-1]
    passes = 1 if config.training.activation_checkpointing == "none" else 2
    value_bytes = 2 if config.training.precision == "bf16" else 4
    slots = config.training.micro_batch * config.data.seq_len * mixture.top_k
    leaving = slots * config.model.hidden_size * value_bytes * (size - 1) // size
    return {
        "ranks": size,
        "experts_of_a_rank": mixture.number // size,
        "all_to_alls": 2 * (passes + 1) * forward,
        "counts": passes * forward,
        "bytes": 2 * (passes + 1) * forward * leaving,
        "scoring_all_to_alls": 2 * forward,
        "scoring_bytes": 2 * forward * leaving,
    }


def show_expert_communication(found: dict[str, Any] | None) -> list[str]:
    """The lines of a plan for people."""
    if found is None:
        return []
    return [
        f"experts       {found['experts_of_a_rank']} of each block on a rank, in groups of {found['ranks']} ranks",
        f"exchange      {found['all_to_alls']:,} all-to-alls of rows a step, {found['bytes'] / 1e6:,.3g} MB out of a "
        f"rank when balanced, and {found['counts']:,} of counts; a scoring pass would add "
        f"{found['scoring_all_to_alls']:,}, {found['scoring_bytes'] / 1e6:,.3g} MB",
    ]
