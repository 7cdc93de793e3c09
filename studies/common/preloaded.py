"""What the fork server of :mod:`studies.common.worker` imports before the first run."""

from pretrain.engine.deepspeed_module import import_deepspeed
from pretrain.run import run_training

__all__ = ["run_training"]

import_deepspeed()
