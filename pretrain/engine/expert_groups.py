"""Expert parallelism: which ranks hold which experts, and what DeepSpeed 0.19.8 has to know of it.

Of W ranks, ``engine.expert_parallel`` = P neighbours hold a block's E experts together, E / P each (``across``), and
the W / P ranks with the same place among their neighbours hold the same ones (``alike``). DeepSpeed sums the gradients
of parameters marked ``allreduce = False`` over ``alike`` only and divides them by W, as all others: a rank's experts
have seen the tokens of all of ``across``, so that this is the mean over the ranks that it would be with P = 1. ZeRO 1
and 2 share these parameters' optimizer state and gradients among ``alike``.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pretrain.distributed import Distributed
from pretrain.model import Decoder
from pretrain.model.experts.experts import Experts


@dataclass(frozen=True)
class ExpertGroups:
    """The ranks that this one shares experts with. With P = 1 nothing is divided, and every answer is the plain one."""

    across: Distributed
    """The P ranks that hold all experts together, by their place in the order of the experts."""
    alike: Distributed
    """The ranks that hold the same experts."""

    @property
    def name(self) -> str:
        """DeepSpeed's, of both groups."""
        return f"ep_size_{self.across.world_size}"

    @property
    def divided(self) -> bool:
        """Whether some experts are on other ranks."""
        return self.across.world_size > 1

    def mark(self, model: Decoder) -> None:
        """Tell DeepSpeed which parameters other ranks have others in place of, before it is given the model."""
        if not self.divided:
            return
        # DeepSpeed looks for a layer of its own to find out that there are experts; nothing of it is computed with
        moe: Any = importlib.import_module("deepspeed.moe.layer").MoE
        sign = type("ExpertParallel", (moe,), {"__init__": nn.Module.__init__, "set_deepspeed_parallelism": _nothing})()
        sign.num_experts, sign.num_local_experts = 0, 0  # it has no files for us to read and write
        sign.expert_group_name = self.name
        model.add_module("expert_parallel", sign)
        for module in model.modules():
            if isinstance(module, Experts):
                for parameter in module.parameters():
                    # by these two DeepSpeed knows a parameter of an expert
                    parameter.allreduce, parameter.group_name = False, self.name  # type: ignore[attr-defined]

    def apart(self, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Parameter groups in which experts that are divided stand by themselves, marked as DeepSpeed wants them."""
        made = []
        for group in groups:
            members = list(zip(group["params"], group["names"], strict=True))
            for divided, marks in ((False, {}), (True, {"moe": True, "name": self.name})):
                chosen = [member for member in members if is_divided(member[0]) == divided]
                if chosen:
                    parameters, names = zip(*chosen, strict=True)
                    made.append({**group, "params": list(parameters), "names": list(names), **marks})
        return made

    def whole_shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """The shape over all ranks."""
        first, *others = shape_of(parameter)
        return (first * self.across.world_size if is_divided(parameter) else first, *others)

    def before(self, parameter: nn.Parameter) -> int:
        """Elements of the whole parameter before those that this rank has."""
        return self.across.rank * math.prod(shape_of(parameter)) if is_divided(parameter) else 0

    def whole(self, parameter: nn.Parameter, values: Tensor) -> Tensor:
        """The values of all ranks from this rank's [E / P, ...]: [E, ...]. Collective, where experts are divided."""
        return self.across.all_gather(values.contiguous()) if is_divided(parameter) else values

    def own(self, parameter: nn.Parameter, values: Tensor) -> Tensor:
        """This rank's of the values of all, [E, ...] -> [E / P, ...]."""
        return values.chunk(self.across.world_size)[self.across.rank] if is_divided(parameter) else values

    def norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """The norm of the whole gradient, of all ranks' experts together. Collective, where experts are divided."""
        gradients: tuple[list[Tensor], list[Tensor]] = [], []
        for parameter in parameters:
            if parameter.grad is not None:
                gradients[is_divided(parameter)].append(parameter.grad)
        norm = nn.utils.get_total_norm(gradients[False])
        if not self.divided:
            return norm
        of_experts = self.across.all_reduce(nn.utils.get_total_norm(gradients[True]).square())
        return (norm.square() + of_experts).sqrt()


def _nothing(*arguments: Any) -> None:
    """In place of what would make process groups."""


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of what this rank and those that share ZeRO's parts with it hold together, also where ZeRO-3 has split
    the parameter over the ranks."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_divided(parameter: Any) -> bool:
    """Whether other ranks have other experts in the place of this parameter."""
    return not getattr(parameter, "allreduce", True)


def expert_groups(size: int, ranks: Distributed) -> ExpertGroups:
    """The groups of ``size`` neighbours, which divides the number of ranks. Collective."""
    if size == 1:
        return ExpertGroups(Distributed(0, 1, ranks.device), ranks)
    groups: Any = importlib.import_module("deepspeed.utils.groups")
    name = f"ep_size_{size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(size)
    across, alike = ranks.rank % size, ranks.rank // size
    return ExpertGroups(
        Distributed(across, size, ranks.device, groups._get_expert_parallel_group(name)),
        Distributed(alike, ranks.world_size // size, ranks.device, groups._get_expert_data_parallel_group(name)),
    )
