"""The model: a Llama-type decoder, its initial weights, and what it costs."""

from .count import ParameterCount, count_parameters, flops_per_token
from .decoder import Decoder
from .initialize import initial_values, initialize_, own_tensors
from .linear import make_linear
from .settings import ModelSettings

__all__ = [
    "Decoder",
    "ModelSettings",
    "ParameterCount",
    "count_parameters",
    "flops_per_token",
    "initial_values",
    "initialize_",
    "make_linear",
    "own_tensors",
]
