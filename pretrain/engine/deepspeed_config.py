"""DeepSpeed's configuration, made from ours."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from data_pipeline.errors import UserError
from data_pipeline.settings import nearest
from pretrain.config import Config

from .deepspeed_module import import_deepspeed


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The dictionary that ``deepspeed.initialize`` takes for this run on ``world_size`` ranks.

    Raises:
        UserError: the batch or the experts don't divide, or ``engine.deepspeed`` sets a key that Headrace sets itself.
    """
    check_experts_divide(config, world_size)
    settings, training, on_gpu = config.engine, config.training, torch.cuda.is_available()
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.zero_stage:
        zero["overlap_comm"] = settings.overlap_communication
        bucket = settings.bucket_elements or (50_000_000 if on_gpu else 500_000)
        zero["reduce_bucket_size"] = zero["allgather_bucket_size"] = bucket
    if settings.zero_stage in (1, 2):
        divided = settings.expert_parallel > 1
        # one more copy of every gradient, against the fragmentation of a GPU's memory: a CPU only pays for it;
        # DeepSpeed has the gradients of expert groups in no other way
        zero["contiguous_gradients"] = on_gpu or divided
        if divided:
            zero["reduce_scatter"] = True
    if settings.zero_stage == 3:
        threshold = settings.persistence_threshold
        zero["stage3_param_persistence_threshold"] = 100_000 if threshold is None else threshold
    if settings.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.micro_batch,
        # the most of any step: what DeepSpeed makes room for; the engine says itself which micro-step is a step's last
        "gradient_accumulation_steps": max(accumulation_steps(config, world_size)),
        # stage 0 in fp32 has no DeepSpeed optimizer around ours: the engine clips there itself, to know the norm
        "gradient_clipping": 0.0 if clips_itself(config) else config.optimizer.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if training.precision == "bf16":
        ours["bf16"] = {"enabled": True}
        if settings.zero_stage:
            ours["data_types"] = {"grad_accum_dtype": "fp32"}
    for key in settings.deepspeed:
        if key not in ours and key not in PASSED and key not in _DERIVED:
            raise UserError(f"engine.deepspeed.{key} is not passed through{nearest(key, PASSED)}")
    return _pass_through(ours, settings.deepspeed)


def clips_itself(config: Config) -> bool:
    """Whether the engine clips gradients itself because no DeepSpeed optimizer does (stage 0, fp32)."""
    return config.engine.zero_stage == 0 and config.training.precision == "fp32"


def accumulation_steps(config: Config, world_size: int) -> list[int]:
    """Micro-steps of an optimizer step, for each stage of the batch ramp and for the time after it.

    Raises:
        UserError: a batch does not divide.
    """
    training = config.training
    together = training.micro_batch * world_size
    batches = {f"batch_ramp.{i}.global_batch": stage.global_batch for i, stage in enumerate(training.batch_ramp)}
    batches["global_batch"] = training.global_batch
    for name, batch in batches.items():
        if batch % together:
            fitting = [
                ranks
                for ranks in range(1, batch + 1)
                if all(each % (training.micro_batch * ranks) == 0 for each in batches.values())
            ]
            raise UserError(
                f"training.{name} = {batch} is not a multiple of micro_batch {training.micro_batch} x {world_size} "
                f"ranks = {together}. Change it to a multiple of {together}, or use one of these numbers of ranks: "
                f"{', '.join(map(str, fitting))}."
            )
    return [batch // together for batch in batches.values()]


def check_experts_divide(config: Config, world_size: int) -> None:
    """Raise UserError where ``engine.expert_parallel`` ranks can't be had from ``world_size`` ranks."""
    size = config.engine.expert_parallel
    if world_size % size:
        fitting = [ranks for ranks in range(1, size + 1) if size % ranks == 0 and world_size % ranks == 0]
        raise UserError(
            f"engine.expert_parallel = {size}: this run's {world_size} ranks are no multiple of it. Use a multiple of "
            f"{size} ranks, or set engine.expert_parallel to {' or '.join(map(str, fitting))}."
        )


def _pass_through(ours: dict[str, Any], extra: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    merged = dict(ours)
    for key, value in extra.items():
        own = ours.get(key)
        if isinstance(own, dict) and isinstance(value, dict):
            merged[key] = _pass_through(own, value, f"{prefix}{key}.")
        elif key in ours or prefix + key in _DERIVED:
            raise UserError(
                f"engine.deepspeed.{prefix}{key} = {value!r} contradicts what Headrace sets there "
                f"({ours.get(key, 'from ' + _DERIVED.get(prefix + key, ''))!r}). Use the settings of Headrace: "
                "training, optimizer, schedule and engine."
            )
        elif value and prefix + key in _BROKEN:
            raise UserError(f"engine.deepspeed.{prefix}{key} = {value!r}: {_BROKEN[prefix + key]}. Leave it out.")
        else:
            merged[key] = _lists(value)
    return merged


def _lists(value: Any) -> Any:
    """Tuples of the immutable settings back to the lists that DeepSpeed expects."""
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def check_zero_settings(made: dict[str, Any]) -> None:
    """Let DeepSpeed look at the ``zero_optimization`` block. Raises UserError for a key or value it does not take."""
    import_deepspeed()
    zero: Any = importlib.import_module("deepspeed.runtime.zero.config")
    try:
        zero.DeepSpeedZeroConfig(**made["zero_optimization"])
    except ValueError as error:  # pydantic's ValidationError is one
        raise UserError(f"engine.deepspeed.zero_optimization: {' '.join(str(error).split())}") from error


PASSED = (
    "aio",
    "bf16",
    "comms_logger",
    "communication_data_type",
    "csv_monitor",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "timers",
    "wall_clock_breakdown",
    "zero_optimization",
)
"""DeepSpeed keys that may be given. The others are ours to set, change what a step computes, or are not for training;
DeepSpeed itself ignores a key that it does not know."""

_DERIVED = {
    "train_batch_size": "training.global_batch",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "fp16": "training.precision",
    "bf16": "training.precision",
    "data_types": "training.precision",
    "zero_optimization.offload_optimizer": "engine.offload_optimizer",
    "zero_optimization.stage3_param_persistence_threshold": "engine.persistence_threshold",
}
"""Keys that Headrace decides even where it leaves them out, and the setting each comes from."""

_BROKEN = {
    "zero_optimization.round_robin_gradients": "with it, DeepSpeed 0.19.8 takes the fp32 weights of one parameter for "
    "those of another wherever they are read or written whole (safe_get_full_fp32_param, safe_set_full_fp32_param)",
}
"""Keys that make DeepSpeed do something wrong, and what."""
