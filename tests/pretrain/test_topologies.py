"""A checkpoint loads on any number of ranks and ZeRO stage: to the bit, by name; then it trains on as it would have."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.config import Config
from pretrain.distributed import Distributed
from tests.ranks import run_on_ranks

from .steps import EngineRun, relative_difference, tiny_config

BATCH = 12
STEPS = 2
ODD = {"hidden_size": 33, "heads": 3, "kv_heads": 1, "head_dim": 8, "intermediate_size": 49}
"""Shapes of which no two ranks can have equal parts."""
GRADUAL = {"begin_step": 0, "end_step": 2, "every_steps": 1, "initial_sparsity": 0.2}
LINEAR = [
    {"kind": "lost", "rank": 6, "column_fraction": 0.1, "modules": ["attention.*"]},
    {"kind": "magnitude_pruned", "sparsity": 0.6, "gradual": GRADUAL, "modules": ["feed_forward.*"]},
]
EXPERTS = {"number": 3, "top_k": 2, "intermediate_size": 11, "dense_first": 1}
MUP = {"base": {"hidden_size": 16, "heads": 2, "intermediate_size": 24}}
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "adamw": {"model": {**ODD, "tied_embeddings": True}},
    "adamw, several groups": {"model": {"mup": MUP}, "engine": {"offload_optimizer": "cpu"}},
    "buffers, bf16": {"model": {**ODD, "linear": LINEAR}, "training": {"precision": "bf16"}},
    "muon, experts and their bias, bf16": {
        "model": {**ODD, "experts": {**EXPERTS, "selection_bias": True}},
        "objective": {"balancing": {"bias": {"rate": 0.013}}},
        "optimizer": {"kind": "muon", "eps": 1e-4},
        "training": {"precision": "bf16"},
        "engine": {"offload_optimizer": "cpu"},
    },
    "galore": {"model": {**ODD, "experts": EXPERTS}, "optimizer": {"kind": "galore", "rank": 8, "gap": 2, "eps": 1e-4}},
}
"""What a checkpoint may hold. The rows mix what has nothing to do with each other, to be few."""


def stages(kind: str) -> tuple[int, ...]:
    return (0, 1, 2) if kind == "galore" else (0, 1, 2, 3)


def configured(kind: str, stage: int, world_size: int) -> Config:
    sections = {name: dict(content) for name, content in KINDS[kind].items()}
    engine = {**sections.get("engine", {}), "zero_stage": stage}
    if stage == 0:
        engine.pop("offload_optimizer", None)
    if stage == 3:
        # many tensors in each group: the biases of Adam's means must be counted for each of them
        engine |= {"persistence_threshold": 100, "deepspeed": {"zero_optimization": {"sub_group_size": 2000}}}
    training = {**sections.get("training", {}), "global_batch": BATCH, "micro_batch": BATCH // world_size}
    return tiny_config(**{**sections, "engine": engine, "training": training})


class Run(EngineRun):
    """Steps of an engine, and what it holds."""

    def held(self) -> dict[str, Any]:
        """Everything that makes up the state, whole, by name, gathered from the ranks by plain indexing."""
        own: list[tuple[str, str, int, int, Any]] = []
        common: dict[str, set[float]] = {}
        matrices: dict[str, Any] = {}
        saving = self.engine.checkpoints
        for shard in saving._shards:
            state = saving._optimizer.state[shard.tensor]
            for key, value in {"weights": shard.tensor.detach(), **state}.items():
                if key == "matrices":
                    matrices |= copy.deepcopy(value)
                    continue
                for part in shard.parts:
                    if isinstance(value, Tensor) and value.dim():
                        flat = value.reshape(-1)[part.offset : part.offset + part.length].float().numpy().copy()
                        own.append((key, part.name, part.start, part.length, flat))  # tensors are pickled slowly
                    else:
                        common.setdefault(f"{key} of {part.name}", set()).add(float(value))
        found: dict[str, Any] = {}
        for parts, _, _ in (everybodys := self.ranks.gather_objects((own, common, matrices))):
            for key, name, start, length, values in parts:
                whole = found.setdefault(f"{key} of {name}", torch.full((math.prod(saving._shapes[name]),), torch.nan))
                whole[start : start + length] = torch.from_numpy(values)
        for _, counts, wholes in everybodys:
            for name, values in counts.items():
                found.setdefault(name, set()).update(values)
            for name, state in wholes.items():
                found |= {f"{key} of {name}": value for key, value in state.items()}
        return found

    def model(self) -> dict[str, Tensor]:
        """What the model computes with: parameters and buffers, whole."""
        import deepspeed

        module = self.engine._engine.module
        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            return {
                name: value.detach().clone() for name, value in [*module.named_parameters(), *module.named_buffers()]
            }


def folder_of(root: Path, kind: str, world_size: int, stage: int) -> Path:
    return root / f"{kind} {world_size} {stage}"


def visit(root: Path, kinds: list[str], others: list[int], saves: bool) -> int:
    """On one rank: load every checkpoint that ``others`` (numbers of ranks) have saved, at every stage; then save one
    of each stage for those to come. Returns how many were loaded."""
    from pretrain.distributed import start

    ranks = start(120)
    loaded = 0
    for kind in kinds:
        for stage in stages(kind):
            config = configured(kind, stage, ranks.world_size)
            run: Run | None = None
            for world_size in others:
                for other in stages(kind):
                    run = run or Run(config, ranks, empty=True)
                    compare(run, folder_of(root, kind, world_size, other), f"{kind}, ZeRO {stage}")
                    loaded += 1
            if saves:
                folder = folder_of(root, kind, ranks.world_size, stage)
                save(Run(config, ranks, empty=False), folder)
                if kind == "adamw" and stage:
                    load_with_other_clipping(folder, ranks, stage)
    return loaded


def save(run: Run, folder: Path) -> None:
    for step in range(STEPS):
        run.step(step)
    if run.ranks.rank == 0:
        folder.mkdir()
    run.ranks.barrier()
    run.engine.save(folder)
    held, model = run.held(), run.model()
    next_loss, _, _ = run.step(STEPS)
    if run.ranks.rank == 0:
        torch.save((held, model, next_loss), folder / "held.pt")
    run.ranks.barrier()


def load_with_other_clipping(folder: Path, ranks: Distributed, stage: int) -> None:
    """Where nothing has moved DeepSpeed loads, and would bring back the bound that the gradient was clipped by."""
    config = configured("adamw", stage, ranks.world_size)
    changed = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"clip_norm": 0.25})})
    run = Run(changed, ranks, empty=True)
    run.engine.load(folder)
    assert run.engine._engine.optimizer.clip_grad == 0.25


def compare(run: Run, folder: Path, where: str) -> None:
    held, model, next_loss = torch.load(folder / "held.pt", weights_only=False)
    run.engine.load(folder)
    now, computes = run.held(), run.model()
    where = f"{folder.name} on {run.ranks.world_size} ranks, {where}"
    assert now.keys() == held.keys(), where
    for name, value in held.items():
        same = torch.equal(now[name], value) if isinstance(value, Tensor) else now[name] == value
        assert same, f"{where}: {name}"
    for name, value in model.items():
        assert torch.equal(computes[name], value), f"{where}: {name} of the model"
    weights = run.engine.full_parameters()  # as DeepSpeed itself puts them together
    for name, value in weights.items():
        assert torch.equal(value.flatten(), held[f"weights of {name}"]), f"{where}: {name} by DeepSpeed"
    assert run.engine._engine.global_steps == STEPS
    loss, _, _ = run.step(STEPS)
    tolerance = 3e-2 if run.config.training.precision == "bf16" else 1e-5
    assert loss == pytest.approx(next_loss, rel=tolerance), where


def assert_alike(root: Path, kind: str, world_size: int) -> None:
    """By name, every saved state is that of stage 0, where torch itself keeps a state for each parameter."""
    reference, _, _ = torch.load(folder_of(root, kind, world_size, 0) / "held.pt", weights_only=False)
    is_bf16 = KINDS[kind].get("training", {}).get("precision") == "bf16"
    for path in sorted(root.glob(f"{kind} */held.pt")):
        held, _, _ = torch.load(path, weights_only=False)
        assert held.keys() == reference.keys()
        for name, value in reference.items():
            if not isinstance(value, Tensor):
                assert held[name] == value, f"{path}: {name}"
            elif name.split()[0] not in ("basis", "mean", "square"):  # of GaLore: along vectors that rounding may turn
                apart = relative_difference({"": held[name]}, {"": value})
                assert apart < (0.1 if is_bf16 else 1e-3), f"{path}: {name} differs by {apart}"


def loads(worlds: int) -> int:
    """Checkpoints of ``worlds`` numbers of ranks, each loaded at every stage."""
    return worlds * sum(len(stages(kind)) ** 2 for kind in KINDS)


@pytest.mark.slow
def test_checkpoints_fit_other_topologies(tmp_path: Path) -> None:
    """2 -> 3 ranks, from every stage to every stage; 3 -> 1 and others stand in ``tests/system``."""
    kinds = list(KINDS)
    assert run_on_ranks(visit, 2, tmp_path, kinds, [], True) == [0, 0]
    assert run_on_ranks(visit, 3, tmp_path, kinds, [2], False) == [loads(1)] * 3
    for kind in kinds:
        assert_alike(tmp_path, kind, 2)


@pytest.mark.campaign
@pytest.mark.timeout(7200)
def test_the_whole_square(tmp_path: Path) -> None:
    """Every pair of {1, 2, 3, 4} ranks and of stages."""
    kinds, worlds = list(KINDS), [1, 2, 3, 4]
    for world_size in worlds:
        run_on_ranks(visit, world_size, tmp_path, kinds, [], True, timeout=1800)
    for kind in kinds:
        assert_alike(tmp_path, kind, 1)
    for world_size in worlds:
        found = run_on_ranks(visit, world_size, tmp_path, kinds, worlds, False, timeout=1800)
        assert found == [loads(len(worlds))] * world_size
