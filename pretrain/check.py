"""What a run demands of its data and of the number of ranks, checked before any work (law 8)."""

from __future__ import annotations

from data_pipeline.errors import UserError

from .config import Config
from .data import RunData, open_data
from .engine import check_zero_settings, deepspeed_config
from .optimizer import check_schedule


def check_run(config: Config, world_size: int, rank: int = 0) -> RunData:
    """The opened data of a run that ``world_size`` ranks can start; ``rank`` looks for its share of the shards.

    Raises:
        UserError: the batch does not divide, ``engine.deepspeed`` contradicts other settings, the schedule is longer
            than the run, a group of one sample would be reweighted, or :func:`open_data` refuses the data.
    """
    check_zero_settings(deepspeed_config(config, world_size))
    check_schedule(config.schedule, config.total_steps)
    _check_reached(config)
    strategy = config.objective.reweighting.strategy
    if strategy != "uniform" and config.training.micro_batch * world_size == 1:
        raise UserError(
            f"objective.reweighting.strategy = {strategy!r} weighs the samples of a micro-step against each other, but "
            "training.micro_batch x ranks = 1: every weight would be 1. Raise training.micro_batch."
        )
    return open_data(config, (rank, world_size))


def _check_reached(config: Config) -> None:
    """Refuse what would come only after the end of the run, and so never."""
    start = config.objective.reweighting.start_step
    if start >= config.total_steps and config.objective.reweighting.strategy != "uniform":
        raise UserError(
            f"objective.reweighting.start_step = {start} is not before the run's end at {config.total_steps} steps: no "
            "sample would be reweighted. Lower it, or set strategy=uniform."
        )
    before = 0
    for stage in config.training.batch_ramp:
        before += stage.steps
        if before >= config.total_steps:
            raise UserError(
                f"training.batch_ramp lasts {sum(each.steps for each in config.training.batch_ramp)} steps, so that "
                f"what follows step {before} is not before the run's end at {config.total_steps} steps. Shorten it, or "
                "make its last batch the global_batch."
            )
    end = config.batch_plan.start_of(config.total_steps)
    for start, stop in config.data.skip_ranges:
        if start >= end:
            raise UserError(
                f"data.skip_ranges: the range ({start}, {stop}) begins after the run's end at position {end}, so it "
                "leaves nothing out. Take it away."
            )
    for phase in config.data.phases:
        if phase.start >= end:
            raise UserError(
                f"data.phases: the phase at position {phase.start} begins after the run's end at {end} "
                f"({config.total_steps} steps of {config.training.global_batch} sequences). Leave it out."
            )
