"""The rows of the method matrix: each module here holds ``METHODS``, from a name to what ``test_method_matrix`` runs.

A module is one family of methods. A new method is one more entry in its family's module, nothing else.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from data_pipeline.batches import Batch
from pretrain.config import Config
from pretrain.model import Decoder

from ..steps import PlainObjective, cross_entropies, plain_adamw, run_plain


@dataclass(frozen=True)
class Method:
    """One configuration that has to make the same update however it is split, and its plain reference."""

    sections: Mapping[str, dict[str, Any]]
    """What ``steps.tiny_config`` merges over the tiny configuration."""
    objective: Callable[[Tensor, Batch, Config, int], Tensor] | None = None
    """The reference's objective: (logits of the whole batch, batch, config, sequences in a group) to a scalar;
    ``None``: ``steps.PlainObjective``."""
    optimizer: Callable[[dict[str, Tensor], Config], Callable[[float], None]] = plain_adamw
    """The reference's optimizer: (fp32 weights by name, config) to a function of the learning rate, one step each."""
    before_step: Callable[[Decoder, dict[str, Tensor], int], None] = lambda model, masters, step: None
    """What the reference does to its model before a step: (model, fp32 weights by name, step)."""
    initial: Callable[[Config], Mapping[str, Tensor]] = lambda config: {}
    """Initial values, by name, that both take in place of the drawn ones."""
    balancing: Callable[[], Any] | None = None
    """Makes the reference's balancing of experts, for one run: ``methods.experts.PlainBalancing``."""
    token_losses: Callable[[Tensor, Tensor], Tensor] = cross_entropies
    """The reference's loss of tokens: (logits [n, V], labels [n]) to [n]."""
    hangs_on_ranks: bool = False
    """What a step minimises depends on the number of ranks, as it is meant to."""
    stages: tuple[int, ...] = (0, 1, 2, 3)
    """ZeRO stages it allows; that the others are refused is shown by a test of its own."""
    tolerances: Mapping[str, float] = field(default_factory=dict)
    """In place of ``test_method_matrix.TOLERANCES``; the row says why."""

    def reference(self, config: Config, group_size: int) -> dict[str, Any]:
        """What the plain loop gives; losses are normalised over ``group_size`` sequences."""
        return run_plain(
            config,
            group_size,
            self.objective or PlainObjective(self.token_losses),
            self.optimizer,
            self.before_step,
            self.initial(config),
            self.balancing() if self.balancing else None,
            self.token_losses,
        )


def families() -> dict[str, dict[str, Method]]:
    """Module to its methods, in the order of their names."""
    modules = [entry.name for entry in pkgutil.iter_modules(__path__)]
    return {name: importlib.import_module(f"{__name__}.{name}").METHODS for name in sorted(modules)}
