"""What a run demands of its data and of the number of ranks, checked before any work (law 8)."""

from __future__ import annotations

import math

from data_pipeline.errors import UserError

from .config import Config
from .data import RunData, open_data
from .engine import accumulation_steps, check_zero_settings, deepspeed_config
from .model import parameter_shapes
from .objective.balancing.kinds.load_balance import LoadBalanceSettings
from .optimizer import check_schedule

SMALL_GROUP = 8
"""Samples below which reweighting within a group is warned of."""


def check_run(config: Config, world_size: int, rank: int = 0) -> RunData:
    """The opened data of a run that ``world_size`` ranks can start; ``rank`` looks for its share of the shards.

    Raises:
        UserError: the batch does not divide, ``engine.deepspeed`` contradicts other settings, the schedule is longer
            than the run, a group of samples can't be reweighted, the optimizer can't update this model, or
            :func:`open_data` refuses the data.
    """
    check_zero_settings(deepspeed_config(config, world_size))
    check_schedule(config.schedule, config.total_steps)
    _check_reached(config)
    _check_group(config, world_size)
    data = open_data(config, (rank, world_size))
    vocabulary = config.model.resolve_vocab_size(data.tokenizer.vocab_size)
    config.optimizer.check(config, parameter_shapes(config.model, vocabulary))
    return data


def warnings(config: Config, world_size: int) -> list[str]:
    """What a run may well not mean, a sentence each; told before it starts."""
    return [*_warn_group(config, world_size), *_warn_routing(config)]


def _warn_routing(config: Config) -> list[str]:
    mixture = config.model.experts
    if mixture is None or mixture.routing.causal:
        return []
    return [
        f"model.experts.routing {mixture.routing.kind} lets later tokens decide which experts a token gets: losses, "
        "those of evaluations too, are lower than what the model can do when it generates. It is for research."
    ]


def _warn_group(config: Config, world_size: int) -> list[str]:
    reweighting, size = config.objective.reweighting, _group_size(config, world_size)
    if reweighting.off or size >= SMALL_GROUP:
        return []
    told = f"objective.reweighting weighs groups of only {size} samples against each other"
    if reweighting.strategy.has_temperature:
        ratio = math.exp(min(1.0 / reweighting.temperature, 700.0))
        share = min(ratio / (ratio + size - 1), (reweighting.cap or math.inf) / size)
        told += f": one of them can take {share:.0%} of a group's weight, where {1 / size:.0%} is uniform"
    mend = "Raise training.micro_batch, or set group=global_batch"
    return [f"{told}. {mend}." if reweighting.group == "micro_step" else f"{told}. Raise training.global_batch."]


def _group_size(config: Config, world_size: int) -> int:
    """Samples over which losses are normalised, in the smallest group of the run."""
    if config.objective.reweighting.group == "micro_step":
        return config.training.micro_batch * world_size
    return min([config.training.global_batch, *(stage.global_batch for stage in config.training.batch_ramp)])


def _check_group(config: Config, world_size: int) -> None:
    """Refuse reweighting that could do nothing, or would be wrong."""
    objective, reweighting = config.objective, config.objective.reweighting
    if reweighting.off:
        return
    if _group_size(config, world_size) == 1:
        what, mend = (
            ("of a micro-step", "training.micro_batch x ranks = 1: every weight would be 1. Raise training.micro_batch")
            if reweighting.group == "micro_step"
            else ("of an optimizer step", "training.global_batch = 1: every weight would be 1. Raise it")
        )
        raise UserError(
            f"objective.reweighting.strategy = {reweighting.strategy.kind!r} weighs the samples {what} against each "
            f"other, but {mend}."
        )
    micro_steps = max(accumulation_steps(config, world_size))
    if micro_steps > 1:
        _check_balanced_group(config, micro_steps)
    if reweighting.group != "global_batch_one_pass" or micro_steps == 1:
        return
    only = f"with {micro_steps} micro-steps an optimizer step, multiplies the finished gradient by its normaliser"
    mend = f"Raise training.micro_batch to {config.training.micro_batch * micro_steps}, or set group=global_batch"
    if objective.z_loss:
        raise UserError(
            f"objective.reweighting.group = 'global_batch_one_pass', {only}; the share of objective.z_loss = "
            f"{objective.z_loss}, whose denominator is another, would be multiplied too. {mend}, or z_loss=0."
        )
    if config.engine.offload_optimizer != "none":
        raise UserError(
            f"objective.reweighting.group = 'global_batch_one_pass', {only}; with engine.offload_optimizer = "
            f"{config.engine.offload_optimizer!r} DeepSpeed has taken the norm that it clips by before that. {mend}, "
            "or offload_optimizer=none."
        )


def _check_balanced_group(config: Config, micro_steps: int) -> None:
    """Refuse losses on routers that need sample weights before a group of several micro-steps has them."""
    balancing, group = config.objective.balancing, config.objective.reweighting.group
    exact = [loss for loss in balancing.losses if isinstance(loss, LoadBalanceSettings) and loss.way == "exact"]
    if balancing.sample_weights and exact and group == "micro_step":
        raise UserError(
            "objective.balancing.sample_weights with frequencies exact needs the weights of the whole optimizer step "
            f"before its first backward pass; group micro_step has those of one of its {micro_steps} micro-steps. Set "
            "objective.reweighting.group=global_batch, other frequencies, or sample_weights=false."
        )
    if balancing.losses and group == "global_batch_one_pass":
        raise UserError(
            f"objective.reweighting.group = 'global_batch_one_pass', with {micro_steps} micro-steps an optimizer step, "
            "multiplies the finished gradient by its normaliser; the shares of objective.balancing.losses, whose "
            "denominator is another, would be multiplied too. Set group=global_batch, or raise training.micro_batch to "
            f"{config.training.micro_batch * micro_steps}."
        )


def check_linear_steps(config: Config, first: int) -> None:
    """Raise UserError where a rule of ``model.linear`` is to change something when a run from step ``first`` is not."""
    for number, rule in enumerate(config.model.linear):
        try:
            rule.check_steps(first, config.total_steps)
        except ValueError as error:
            raise UserError(f"model.linear.{number} ({rule.kind}): {error}") from error


def _check_reached(config: Config) -> None:
    """Refuse what would come only after the end of the run, and so never."""
    reweighting = config.objective.reweighting
    if reweighting.start_step >= config.total_steps and not reweighting.strategy.neutral:
        raise UserError(
            f"objective.reweighting.start_step = {reweighting.start_step} is not before the run's end at "
            f"{config.total_steps} steps: no sample would be reweighted. Lower it, or set strategy=uniform."
        )
    if reweighting.warmup and reweighting.start_step + reweighting.warmup.steps >= config.total_steps:
        raise UserError(
            f"objective.reweighting.warmup ends after step {reweighting.start_step + reweighting.warmup.steps}, which "
            f"is not before the run's end at {config.total_steps} steps: temperature = {reweighting.temperature} would "
            "never be reached. Shorten it."
        )
    check_linear_steps(config, 0)
    balancing = config.objective.balancing
    changes = {f"losses.{number}": loss.change for number, loss in enumerate(balancing.losses)}
    if balancing.bias is not None:
        changes["bias"] = balancing.bias.change
    for name, change in changes.items():
        if change is not None and change.end_step >= config.total_steps:
            raise UserError(
                f"objective.balancing.{name}.change ends at step {change.end_step}, which is not before the run's end "
                f"at {config.total_steps} steps: {change.to:g} would never be reached. Let it end earlier."
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
