"""What every process pays to look at a configuration or a checkpoint."""

from __future__ import annotations

import subprocess
import sys


def test_the_compiler_is_loaded_by_those_alone_who_need_it() -> None:
    """It takes a second of CPU time, more than all else but PyTorch."""
    look = "import sys, pretrain.train; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", look], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
