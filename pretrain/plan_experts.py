"""What expert parallelism costs, by arithmetic: for ``pretrain plan``."""

from __future__ import annotations

from typing import Any

from .config import Config
from .engine import accumulation_steps
from .objective import scores_first


def expert_communication(config: Config, ranks: int) -> dict[str, Any] | None:
    """The exchange of tokens in an optimizer step of a run on ``ranks`` ranks; None where experts are not divided.

    Each block with experts sends the rows of a micro-batch to their experts and back, in the forward pass, its
    recomputation and the backward pass, and before each of the first two how many rows go where. A scoring pass, where
    the objective makes one in some step, is one more forward pass.

    Returns:
        ``ranks`` that share a block's experts and ``experts_of_a_rank``; ``all_to_alls`` of rows and of ``counts`` in a
        step, and ``scoring_all_to_alls`` of rows that its scoring pass adds; ``bytes`` of rows that leave a rank in a
        step, and ``scoring_bytes`` in its scoring pass, when all experts have equally many of ``top_k`` slots a token.
    """
    mixture, size = config.model.experts, config.engine.expert_parallel
    if mixture is None or size == 1:
        return None
    micro_steps = accumulation_steps(config, ranks)[-1]
    forward = len(config.model.expert_layers) * micro_steps
    # what changes over a run changes once, at its reweighting's first step or on the way from the first to the last
    steps = (0, config.objective.reweighting.start_step, config.total_steps - 1)
    scoring = forward if any(scores_first(config.objective, step, micro_steps) for step in steps) else 0
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
        "scoring_all_to_alls": 2 * scoring,
        "scoring_bytes": 2 * scoring * leaving,
    }


def show_expert_communication(found: dict[str, Any] | None) -> list[str]:
    """The lines of a plan for people."""
    if found is None:
        return []
    scoring = found["scoring_all_to_alls"]
    adds = f"; its scoring pass adds {scoring:,}, {found['scoring_bytes'] / 1e6:,.3g} MB, and {scoring // 2:,}"
    return [
        f"experts       {found['experts_of_a_rank']} of each block on a rank, in groups of {found['ranks']} ranks",
        f"exchange      {found['all_to_alls']:,} all-to-alls of rows a step, {found['bytes'] / 1e6:,.3g} MB out of a "
        f"rank when balanced, and {found['counts']:,} of counts{adds if scoring else ''}",
    ]
