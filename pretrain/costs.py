"""What a run takes, by arithmetic: parameters, FLOPs, optimizer state and buffers by parameterization; activations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .config import Config
from .model import activation_bytes, linear_layers, mixture_count, moment_flops_per_step, parameter_shapes
from .model.recompute import ActivationCheckpointing

RECOMPUTES: tuple[ActivationCheckpointing, ...] = ("none", "full", "low_rank")


@dataclass
class Part:
    """The embedding, the head, the norms, the routed experts, their routers, or the linear layers of the blocks under
    one rule of ``model.linear``."""

    name: str
    layers: int = 0
    """Linear layers of the blocks."""
    parameters: int = 0
    flops_per_token: int = 0
    """Of multiplications by weights, forward and backward: 6 for each (attention's own work is the whole model's); of
    routed experts, those that a token goes to."""
    flops_per_step: int = 0
    """Besides, once an optimizer step, on every rank."""
    optimizer_bytes: int = 0
    """Over all ranks: the optimizer's fp32 state, and the fp32 copy of the parameters where the engine keeps one."""
    buffer_bytes: int = 0
    """On every rank."""


def parts(config: Config, vocab_size: int) -> list[Part]:
    """The parts of the model; a tied head has its FLOPs and no parameters of its own."""
    model = config.model
    embedding, head, norms, dense = Part("embedding"), Part("head"), Part("norms"), Part("dense")
    experts, routers, mixture = Part("experts"), Part("routers"), mixture_count(model)
    rules = [Part(f"linear.{number} ({rule.kind})") for number, rule in enumerate(model.linear)]
    owner = {"embedding": embedding, "head": head}
    for linear in linear_layers(model):
        part = rules[model.linear.index(linear.method)] if linear.method in model.linear else dense
        owner[linear.name] = part
        part.layers += 1
        part.flops_per_token += 6 * linear.cost.multiplied
        part.buffer_bytes += linear.cost.buffer_bytes
    for layer in model.expert_layers:
        owner[f"blocks.{layer}.feed_forward.experts"], owner[f"blocks.{layer}.feed_forward.router"] = experts, routers
        experts.flops_per_token += 6 * mixture.active
        routers.flops_per_token += 6 * mixture.router
        routers.buffer_bytes += mixture.bias_bytes
    head.flops_per_token = 6 * vocab_size * model.hidden_size
    if config.objective.loss.from_moments:
        head.flops_per_token = 6 * model.hidden_size**2
        head.flops_per_step = moment_flops_per_step(model, vocab_size)
    for name, shape in parameter_shapes(model, vocab_size).items():
        part = owner.get(name.rpartition(".")[0], norms)
        part.parameters += math.prod(shape)
        masters = math.prod(shape) if has_masters(config) else 0
        part.optimizer_bytes += 4 * (config.optimizer.state_elements(name, shape) + masters)
    every = (embedding, *rules, dense, experts, routers, norms, head)
    return [part for part in every if part.parameters or part.flops_per_token]


def has_masters(config: Config) -> bool:
    """Whether the engine keeps an fp32 copy of the parameters: ZeRO does even where the parameters are fp32."""
    return config.training.precision == "bf16" or config.engine.zero_stage > 0


def parameters_of_a_rank(config: Config, shapes: Mapping[str, Sequence[int]]) -> int:
    """Of all ``shapes``, where ZeRO splits none: a rank has its part of the experts."""
    size = config.engine.expert_parallel
    return sum(math.prod(shape) // (size if ".experts." in name else 1) for name, shape in shapes.items())


def memory(config: Config, vocab_size: int, ranks: int) -> dict[str, Any]:
    """Bytes of what depends on the method.

    Returns:
        ``weights_of_a_rank``, of the model in the precision of training; ``optimizer_state`` over all ranks, and
        ``optimizer_state_of_a_rank`` of ``ranks``; ``buffers`` on every rank;
        ``activations`` on every rank at their peak (:mod:`pretrain.model.activations`), for each choice of
        ``training.activation_checkpointing`` that the model allows: of a ``token`` and of a ``micro_batch``.
    """
    counted = parts(config, vocab_size)
    state = sum(part.optimizer_bytes for part in counted)
    shapes = parameter_shapes(config.model, vocab_size)
    if config.engine.zero_stage:
        of_a_rank = -(-state // ranks)
    else:
        size = config.engine.expert_parallel
        of_a_rank = sum(part.optimizer_bytes // (size if part.name == "experts" else 1) for part in counted)
    parameters = parameters_of_a_rank(config, shapes)
    if config.engine.zero_stage == 3:
        parameters = -(-parameters // ranks)
    factorised = any(layer.cost.products for layer in linear_layers(config.model))
    tokens = config.training.micro_batch * config.data.seq_len
    value_bytes = 2 if config.training.precision == "bf16" else 4
    peaks = {
        how: activation_bytes(
            config.model,
            vocab_size,
            config.data.seq_len,
            value_bytes,
            how,
            z_loss=config.objective.z_loss > 0,
            from_moments=config.objective.loss.from_moments,
        ).peak
        for how in RECOMPUTES
        if factorised or how != "low_rank"
    }
    return {
        "weights_of_a_rank": parameters * value_bytes,
        "optimizer_state": state,
        "optimizer_state_of_a_rank": of_a_rank,
        "buffers": sum(part.buffer_bytes for part in counted),
        "activations": {how: {"token": peak, "micro_batch": peak * tokens} for how, peak in peaks.items()},
    }
