"""A method is one file: a strategy, a parameterization and an optimizer are added to a copy of the package, no other
file of it is touched, and a run with them is to the bit the run with what they reimplement."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

STRATEGY = """
from typing import Literal
from torch import Tensor
from ..base import StrategySettings

class MiddleSettings(StrategySettings):
    kind: Literal["middle"] = "middle"

    def score(self, h: Tensor) -> Tensor:
        return 1.0 - h * h
"""

LINEAR = """
from typing import Literal
import torch
import torch.nn.functional as F
from torch import nn
from ..base import LinearCost, LinearSettings
from ..terms import Term

class Bottleneck(nn.Module):
    def __init__(self, ins, outs, width):
        super().__init__()
        self.std = (width * (ins + outs)) ** -0.25
        self.a = nn.Parameter(torch.empty(width, ins))
        self.b = nn.Parameter(torch.empty(outs, width))

    def forward(self, x):
        return F.linear(F.silu(F.linear(x, self.a)), self.b)

    def initial_values(self, draw):
        return {name: draw(name, tuple(p.shape), self.std) for name, p in self.named_parameters()}

class BottleneckSettings(LinearSettings):
    kind: Literal["bottleneck"] = "bottleneck"
    width: int

    def make(self, ins, outs, init_std):
        return Bottleneck(ins, outs, self.width)

    def cost(self, ins, outs):
        return LinearCost(self.width * (ins + outs), self.width * (ins + outs), 2 * self.width)

    def terms(self):
        return (Term("b", down="a", activation="silu"),)
"""

OPTIMIZER = """
import math
from typing import Literal
import torch
from ..base import OptimizerSettings

class MomentsSettings(OptimizerSettings):
    kind: Literal["moments"] = "moments"

    def build(self, groups):
        return torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def state_elements(self, name, shape):
        return 2 * math.prod(shape)
"""

ADDED = {
    "objective/strategies/middle.py": STRATEGY,
    "model/linear/kinds/bottleneck.py": LINEAR,
    "optimizer/kinds/moments.py": OPTIMIZER,
}

PROGRAM = """
import json, sys
from data_pipeline.errors import UserError
from pretrain.costs import parts
from pretrain.distributed import finish, start
from tests.pretrain.steps import VOCABULARY, run_engine, tiny_config

def config(strategy, rule, optimizer):
    return tiny_config(
        objective={"reweighting": {"strategy": strategy, "temperature": 0.4}},
        model={"linear": [rule]}, optimizer={"kind": optimizer}, training={"micro_batch": 8},
        engine={"zero_stage": 1},
    )

ranks = start(60)
own = config("middle", {"kind": "bottleneck", "width": 6}, "moments")
built_in = config("quadratic", {"kind": "cola", "rank": 6}, "adamw")
try:
    config("midle", {"kind": "bottlenek", "width": 6}, "momints")
except UserError as error:
    told = str(error)
runs = [run_engine(each, ranks) for each in (own, built_in)]
same = {key: runs[0][key] == runs[1][key] for key in ("losses", "objectives", "norms")}
same["parameters"] = all((p == runs[1]["parameters"][name]).all().item() for name, p in runs[0]["parameters"].items())
counted = [[(part.parameters, part.flops_per_token, part.optimizer_bytes) for part in parts(each, VOCABULARY)]
           for each in (own, built_in)]
names = [part.name for part in parts(own, VOCABULARY)]
print("FOUND " + json.dumps([told, same, counted[0] == counted[1], names]), flush=True)
finish(0, together=True)
"""


@pytest.mark.slow
def test_a_method_is_one_file(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "pretrain", tmp_path / "pretrain", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in ADDED.items():
        assert not (tmp_path / "pretrain" / name).exists()
        (tmp_path / "pretrain" / name).write_text(text)
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("FOUND ")]
    told, same, costs_agree, parts = json.loads(line.removeprefix("FOUND "))
    for kind in ("middle", "bottleneck", "moments"):
        assert f"did you mean '{kind}'?" in told
    assert all(same.values()), same
    assert costs_agree
    assert "linear.0 (bottleneck)" in parts
