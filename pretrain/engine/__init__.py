"""The engine: the only room that knows DeepSpeed."""

from .deepspeed_config import accumulation_steps, check_zero_settings, deepspeed_config
from .deepspeed_module import import_deepspeed
from .engine import Engine
from .layout import TAG, read_layout

__all__ = [
    "TAG",
    "Engine",
    "accumulation_steps",
    "check_zero_settings",
    "deepspeed_config",
    "import_deepspeed",
    "read_layout",
]
