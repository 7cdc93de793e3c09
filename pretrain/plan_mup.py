"""What muP makes of each kind of tensor, for ``pretrain plan``."""

from __future__ import annotations

from typing import Any

from .config import Config
from .model.linear import layer_shapes
from .model.linear.choose import initial_std
from .model.mup import forward_multipliers, width, width_scaling
from .optimizer.groups import is_norm_or_embedding


def mup_rows(config: Config) -> list[dict[str, Any]]:
    """A row for all tensors that have everything in common, as JSON has it; none without muP.

    Initial standard deviation and weight decay are those in force, the learning rate is a factor of the schedule's,
    ``multiplier`` what the forward pass multiplies by. Gains start at 1, which is no deviation.
    """
    model, optimizer = config.model, config.optimizer
    if model.mup is None:
        return []
    multipliers = forward_multipliers(model)

    def row(name: str, label: str, std: float | None, m: float | None, multiplier: float = 1.0) -> dict[str, Any]:
        factors = width_scaling(f"{name}.weight", model, optimizer.mup_rate)
        exempt = is_norm_or_embedding(f"{name}.weight") and not optimizer.decay_norms_and_embeddings
        return {
            "tensors": [label],
            "m": m,
            "initial_std": std,
            "learning_rate": factors.learning_rate,
            "weight_decay": 0.0 if exempt else optimizer.weight_decay * factors.weight_decay,
            "multiplier": multiplier,
        }

    rows = [
        row("embedding", "embedding", model.init_std, None, multipliers.embedding),
        row("norm", "norms", None, None),
    ]
    for layer in layer_shapes(model):
        name = f"blocks.0.{layer}"
        made = row(name, layer, initial_std(name, model), width(name, model))
        same = [known for known in rows if {**known, "tensors": 0} == {**made, "tensors": 0}]
        if same:
            same[0]["tensors"].append(layer)
        else:
            rows.append(made)
    # a tied head is the embedding once more
    owner = "embedding" if model.tied_embeddings else "head"
    std = model.init_std if model.tied_embeddings else initial_std("head", model)
    scores = {"tensors": ["attention scores"], "m": None, "multiplier": multipliers.attention}
    return [*rows, row(owner, "head", std, width("head", model), multipliers.head), scores]


def show_mup(rows: list[dict[str, Any]]) -> list[str]:
    """The rows for people, one line each."""
    lines = []
    for row in rows:
        said = [f"m {row['m']:g}"] if row["m"] is not None else []
        if "learning_rate" in row:
            said += [f"initial std {row['initial_std']:.3g}"] if row["initial_std"] is not None else []
            said += [f"learning rate x {row['learning_rate']:.3g}", f"weight decay {row['weight_decay']:.3g}"]
        said += [f"forward pass x {row['multiplier']:.3g}"] if row["multiplier"] != 1.0 else []
        if said:
            lines.append(f"muP           {', '.join(row['tensors'])}: {', '.join(said)}")
    return lines
