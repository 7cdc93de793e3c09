"""The engine: the only room that knows DeepSpeed."""

from .deepspeed_config import accumulation_steps, deepspeed_config
from .engine import TAG, Engine, import_deepspeed

__all__ = ["TAG", "Engine", "accumulation_steps", "deepspeed_config", "import_deepspeed"]
