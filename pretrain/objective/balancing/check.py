"""What balancing and the mixture of experts demand of each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.model.settings import ModelSettings

if TYPE_CHECKING:
    from ..settings import ObjectiveSettings


def check_balancing(objective: ObjectiveSettings, model: ModelSettings) -> None:
    """Refuse what has no meaning together.

    Raises:
        ValueError: names the settings and the reason.
    """
    balancing, mixture = objective.balancing, model.experts
    if mixture is None:
        if balancing.losses or balancing.bias:
            raise ValueError(
                "objective.balancing has no meaning without model.experts; leave it out, or set it to null where it is "
                "inherited"
            )
        return
    if balancing.bias and not mixture.selection_bias:
        raise ValueError("objective.balancing.bias moves model.experts.selection_bias, which is off; turn it on")
    if mixture.selection_bias and not balancing.bias and model.weights_from is None:
        raise ValueError(
            "model.experts.selection_bias stays 0 without objective.balancing.bias, and without model.weights_from, "
            "which might give another; give one of them, or leave it out"
        )
    entropy = [loss.kind for loss in balancing.losses if loss.needs_entropy]
    if entropy and mixture.entropy is None:
        raise ValueError(f"objective.balancing.losses: {entropy[0]} needs model.experts.entropy, whose order it has")
    if mixture.entropy is not None and not entropy and mixture.routing.kind != "hybrid":
        raise ValueError(
            "model.experts.entropy is used by neither routing hybrid nor a loss of kind entropy; leave it out"
        )
    if mixture.routing.kind == "expert_choice" and any(loss.balances for loss in balancing.losses):
        raise ValueError(
            "objective.balancing.losses: load_balance has nothing to do with model.experts.routing expert_choice, "
            "where all experts have the same load; leave it out"
        )
    if balancing.sample_weights and objective.reweighting.off:
        raise ValueError("objective.balancing.sample_weights has no meaning without reweighting; leave it out")
