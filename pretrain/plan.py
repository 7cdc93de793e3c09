"""``pretrain plan``: everything about a run that can be known before it starts (law 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from data_pipeline import kernel

from .beginning import open_beginning
from .check import check_run, warnings
from .checkpoint import complete_checkpoints
from .config import Config, load_config
from .costs import memory, parts
from .engine import accumulation_steps
from .missing import Missing, check_missing, told
from .model import count_parameters, flops_per_token
from .plan_experts import expert_communication, show_expert_communication
from .plan_mup import mup_rows, show_mup
from .run_folder import CHECKPOINTS
from .state import end_position, leaving_out, left_out, resume_state


def make_plan(path: Path, overrides: Sequence[str], ranks: int) -> dict[str, Any]:
    """The plan of a run on ``ranks`` ranks, as JSON has it.

    Raises:
        UserError: whatever would stop the run before its first step.
    """
    config = load_config(path, overrides)
    data = check_run(config, ranks)
    origin = _origin(config)
    if config.resume != "never":
        config = leaving_out(config, left_out(config, origin))
    # from where a start now would begin
    state = resume_state(origin, config, data) if origin else open_beginning(config, data).state
    end = end_position(config, state)
    missing = check_missing(config, data, state.holes, state.position, end)
    vocabulary = config.model.resolve_vocab_size(data.tokenizer.vocab_size)
    parameters = count_parameters(config.model, vocabulary)
    sequences = config.batch_plan.sequences_before(end)
    tokens = sequences * config.data.seq_len
    needed = data.order.needed(end).tolist()
    per_token = flops_per_token(config.model, vocabulary, config.data.seq_len, config.objective.loss.from_moments)
    counted = parts(config, vocabulary)
    per_step = ranks * sum(part.flops_per_step for part in counted)
    return {
        "run_folder": str(config.run_folder),
        "parameters": parameters.total,
        "active_parameters": parameters.active,
        "non_embedding_parameters": parameters.non_embedding,
        "vocab_size": vocabulary,
        "flops_per_token": per_token,
        "flops": per_token * tokens + per_step * config.total_steps,
        "parts": [asdict(part) for part in counted],
        "memory": memory(config, vocabulary, ranks),
        "expert_parallel": expert_communication(config, ranks),
        "mup": mup_rows(config),
        "steps": config.total_steps,
        "sequences": sequences,
        "tokens": tokens,
        "tokens_per_step": config.training.global_batch * config.data.seq_len,
        "accumulation_steps": accumulation_steps(config, ranks)[-1],
        "order": config.data.order,
        "skipped_sequences": end - sequences,
        "phases": [phase.model_dump() for phase in config.data.phases],
        "batch_ramp": [stage.model_dump() for stage in config.training.batch_ramp],
        "sources": {
            name: {"sequences": source.sequences, "drawn": drawn, "epochs": drawn / source.sequences}
            for name, source, drawn in zip(data.names, data.sources, needed, strict=True)
        },
        "missing": asdict(missing) if missing else None,
        "batches": kernel.describe(),
        "warnings": warnings(config, ranks),
    }


def _origin(config: Config) -> Path | None:
    """The checkpoint that a start now would go on from; None: it would begin anew."""
    known = complete_checkpoints(config.run_folder / CHECKPOINTS) if config.resume != "never" else []
    if known:
        return known[-1]
    return None if config.resume in ("auto", "never") else Path(config.resume)


def show_plan(plan: dict[str, Any]) -> str:
    """A plan for people."""
    ramp = " (after the ramp)" if plan["batch_ramp"] else ""
    few = plan["active_parameters"] < plan["parameters"]
    active = f", {plan['active_parameters']:,} active for a token" if few else ""
    lines = [
        f"run folder    {plan['run_folder']}",
        f"model         {plan['parameters']:,} parameters, {plan['non_embedding_parameters']:,} outside embedding and "
        f"head{active}; vocabulary {plan['vocab_size']:,}",
        f"training      {plan['steps']:,} steps of {plan['tokens_per_step']:,} tokens{ramp}, "
        f"{plan['tokens']:,} tokens in all; "
        f"{plan['accumulation_steps']} micro-steps a step",
        f"arithmetic    {plan['flops_per_token']:.3e} FLOPs a token, {plan['flops']:.3e} in all",
        *_show_parts(plan),
        *show_expert_communication(plan["expert_parallel"]),
        *show_mup(plan["mup"]),
    ]
    for when, stage in zip(chain(["first"], repeat("then")), plan["batch_ramp"], strict=False):
        lines.append(f"ramp          {when} {stage['steps']:,} steps of {stage['global_batch']:,} sequences")
    lines.append(
        f"order         {plan['order']}"
        + (f", {plan['skipped_sequences']:,} sequences left out" if plan["skipped_sequences"] else "")
    )
    for phase in plan["phases"]:
        shares = ", ".join(f"{name} {weight:g}" for name, weight in phase["weights"].items())
        lines.append(f"phase         from position {phase['start']:,} on: {shares}")
    for name, source in plan["sources"].items():
        lines.append(
            f"source        {name}: {source['drawn']:,} of its {source['sequences']:,} sequences = "
            f"{source['epochs']:.2f} epochs"
        )
    if plan["missing"]:
        lines.append(f"missing       {told(Missing(**plan['missing']))}")
    lines.append(f"batches       made by {plan['batches']}")
    lines += [f"warning       {warning}" for warning in plan["warnings"]]
    return "\n".join(lines)


def _show_parts(plan: dict[str, Any]) -> list[str]:
    """What the parts of the model take, and the memory that depends on the method."""
    lines = []
    for part in plan["parts"]:
        layers = f"{part['layers']} layers, " if part["layers"] else ""
        buffers = f", {_bytes(part['buffer_bytes'])} of buffers" if part["buffer_bytes"] else ""
        once = f" and {part['flops_per_step']:.3e} a step on each rank" if part["flops_per_step"] else ""
        lines.append(
            f"part          {part['name']}: {layers}{part['parameters']:,} parameters, "
            f"{part['flops_per_token']:.3e} FLOPs a token{once}, {_bytes(part['optimizer_bytes'])} of optimizer "
            f"state{buffers}"
        )
    taken = plan["memory"]
    whole, of_a_rank = taken["optimizer_state"], taken["optimizer_state_of_a_rank"]
    lines.append(
        f"memory        weights {_bytes(taken['weights_of_a_rank'])} on a rank; optimizer state {_bytes(whole)}, "
        f"{_bytes(of_a_rank)} on a rank; buffers {_bytes(taken['buffers'])} on each"
    )
    for how, peak in taken["activations"].items():
        lines.append(
            f"activations   {_bytes(peak['token'])} a token, {_bytes(peak['micro_batch'])} a micro-batch with "
            f"activation_checkpointing {how} (estimate)"
        )
    return lines


def _bytes(count: int) -> str:
    """Three digits, in a unit of powers of 1000."""
    size, unit = float(count), 0
    while size >= 999.5 and unit < 4:
        size, unit = size / 1000, unit + 1
    return f"{size:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"
