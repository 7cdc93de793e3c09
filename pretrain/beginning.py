"""What a run begins with that has no checkpoint of its own: its place, weights from elsewhere, masks."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from data_pipeline.errors import UserError

from .check import check_linear_steps
from .config import Config
from .data import RunData, check_end
from .initial_masks import MaskSource, decide_masks, open_masks
from .initial_weights import CheckpointWeights, Weights, open_weights
from .state import TrainState, end_position, rewound_state


@dataclass
class Beginning:
    """Opened and checked; rank 0 reads weights and masks from it when the engine fills them in."""

    state: TrainState
    weights: Weights | None
    """Of ``model.weights_from``."""
    mask_sources: list[MaskSource]
    shapes: dict[str, tuple[int, ...]]
    """Of everything that is not drawn, by name."""
    _masks: dict[str, Tensor] = field(default_factory=dict)

    def decide_masks(self) -> Beginning:
        """Decide the masks of pruned layers, which takes a second for 30 million weights. Rank 0 alone.

        Raises:
            UserError: another run has pruned more than a rule keeps.
        """
        for source in self.mask_sources:
            self._masks |= decide_masks(source)
        return self

    def read(self, name: str) -> Tensor:
        """One tensor, whole, on the CPU. Rank 0 alone."""
        if name in self._masks:
            return self._masks[name]
        assert self.weights is not None
        return self.weights.read(name)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_masks": {}}  # the other ranks get them where they are filled in, one by one


def open_beginning(config: Config, data: RunData) -> Beginning:
    """Whatever a run begins with, checked against it. Looks at every file that it names.

    Raises:
        UserError: something does not fit the run; says what.
        DataError: something is damaged.
    """
    weights = open_weights(config, data.tokenizer)
    state = TrainState()
    if config.training.rewind:
        if not isinstance(weights, CheckpointWeights):
            raise UserError(
                f"training.rewind: model.weights_from = {config.model.weights_from!r} holds no place in a run to go "
                "back to. Give a step_... folder, or rewind=false."
            )
        state = rewound_state(weights.path, config, data)
        check_linear_steps(config, state.step)
    else:
        check_end(config, data.order, end_position(config, state))
    sources = open_masks(config)
    shapes = {f"{name}.mask": shape for source in sources for name, shape in source.layers.items()}
    return Beginning(state, weights, sources, {**(weights.shapes if weights else {}), **shapes})
