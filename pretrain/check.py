"""What a run demands of its data and of the number of ranks, checked before any work (law 8)."""

from __future__ import annotations

from data_pipeline.errors import UserError

from .config import Config
from .data import RunData, open_data
from .engine import deepspeed_config
from .optimizer import check_schedule


def check_run(config: Config, world_size: int) -> RunData:
    """The opened data of a run that ``world_size`` ranks can start.

    Raises:
        UserError: the batch does not divide, ``engine.deepspeed`` contradicts other settings, the schedule is longer
            than the run, a group of one sample would be reweighted, or :func:`open_data` refuses the data.
    """
    deepspeed_config(config, world_size)
    check_schedule(config.schedule, config.total_steps)
    strategy = config.objective.reweighting.strategy
    if strategy != "uniform" and config.training.micro_batch * world_size == 1:
        raise UserError(
            f"objective.reweighting.strategy = {strategy!r} weighs the samples of a micro-step against each other, but "
            "training.micro_batch x ranks = 1: every weight would be 1. Raise training.micro_batch."
        )
    return open_data(config)
