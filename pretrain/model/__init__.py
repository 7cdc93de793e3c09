"""The model: a Llama-type decoder, its initial weights, and what it costs."""

from .activations import ActivationBytes, activation_bytes
from .count import (
    ParameterCount,
    count_parameters,
    flops_per_token,
    linear_layers,
    mixture_count,
    moment_flops_per_step,
    parameter_shapes,
)
from .decoder import Decoder, Outputs
from .initialize import initial_values, initialize_, own_tensors
from .linear import make_linear
from .settings import ModelSettings

__all__ = [
    "ActivationBytes",
    "Decoder",
    "ModelSettings",
    "Outputs",
    "ParameterCount",
    "activation_bytes",
    "count_parameters",
    "flops_per_token",
    "initial_values",
    "initialize_",
    "linear_layers",
    "make_linear",
    "mixture_count",
    "moment_flops_per_step",
    "own_tensors",
    "parameter_shapes",
]
