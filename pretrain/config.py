"""The configuration of a run: one typed, closed tree (laws 7 and 8), read by ``load_config``.

Every field says below it what it means and in which unit. What two fields demand of each other is checked here, what
a field demands of the data or of the number of ranks is checked by :mod:`pretrain.check` before any work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from data_pipeline import BatchPlan
from data_pipeline.errors import UserError
from data_pipeline.settings import LONGEST_WAIT, Settings, load_settings
from data_pipeline.stream import StreamSettings

from .model import linear_layers
from .model.recompute import ActivationCheckpointing
from .model.settings import ModelSettings
from .objective.balancing.check import check_balancing
from .objective.settings import ObjectiveSettings
from .optimizer import AdamWSettings, Optimizer, ScheduleSettings
from .stability.settings import StabilitySettings


class RunSettings(Settings):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its folder is ``folder/name``."""
    folder: str = "runs"
    """Folder that holds the runs, relative to the working directory."""
    seed: int = Field(default=1, ge=0, lt=2**63)
    """Fixes the initial weights and the order of the data."""


class DataSettings(StreamSettings):
    """What a run reads (:class:`data_pipeline.stream.StreamSettings` has most of it), and how."""

    tokenizer: str | None = None
    """A SentencePiece model that must be the data sets' own; ``null`` takes theirs."""
    prefetch: int = Field(default=4, ge=0)
    """Optimizer steps prepared ahead by a thread; 0 reads in the training thread."""
    max_hole_fraction: float = Field(default=0.001, ge=0, le=1)
    """With ``on_damage: hole``: the run stops before holes are more than this fraction of all its sequences."""
    watchdog_seconds: float = Field(default=120.0, gt=0, le=LONGEST_WAIT)
    """A read that takes longer is told: source, shard and byte offset that it waits for."""
    skip_ranges: tuple[tuple[int, int], ...] = ()
    """Positions [start, stop) to leave out, ascending: after a loss spike, resume from before it and skip its range."""
    accept_change: str | None = None
    """Go on with other data than the checkpoint's, in spite of the refusal: the code that the refusal gives, so that it
    holds for that change only. Recorded in the run."""

    @model_validator(mode="after")
    def _check_holes(self) -> DataSettings:
        default = type(self).model_fields["max_hole_fraction"].default
        if self.on_damage == "stop" and self.max_hole_fraction != default:
            raise ValueError(
                f"max_hole_fraction {self.max_hole_fraction} says nothing with on_damage: stop, which allows no hole; "
                f"set on_damage: hole, or leave max_hole_fraction out ({default})"
            )
        return self

    @model_validator(mode="after")
    def _check_skipped(self) -> DataSettings:
        try:
            BatchPlan(1, skip_ranges=self.skip_ranges)
        except UserError as error:
            raise ValueError(str(error)) from error
        return self


class RampSettings(Settings):
    steps: int = Field(ge=1)
    """Optimizer steps of this stage."""
    global_batch: int = Field(ge=1)
    """Sequences in each of them."""


class TrainingSettings(Settings):
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of the whole run. Exactly one of ``steps`` and ``tokens`` is given."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens of the whole run, rounded up to whole optimizer steps."""
    global_batch: int = Field(ge=1)
    """Sequences in an optimizer step, over all ranks and accumulation steps."""
    batch_ramp: tuple[RampSettings, ...] = ()
    """Stages with other batches, after which ``global_batch`` holds for the rest of the run. The order of the samples
    does not change."""
    micro_batch: int = Field(ge=1)
    """Sequences of one rank in one forward pass."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of parameters, activations and gradients in forward and backward; the optimizer's copy is always fp32. Over the
    micro-steps of a step, bf16 gradients are summed in fp32 at ZeRO stages 1 to 3, at stage 0 in bf16."""
    rewind: bool = False
    """Begin at the step and the data position of the checkpoint that ``model.weights_from`` names, so that schedule and
    samples are those that followed it in its own run; the optimizer begins anew. For lottery-ticket experiments."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """``full`` recomputes every block in the backward pass from its input. ``low_rank`` (CoLA-M) also keeps the
    r-dimensional activations of the factorised layers, whose first products are then not recomputed."""
    compile: bool = False
    """Compile every block with torch.compile."""

    @model_validator(mode="after")
    def _check(self) -> TrainingSettings:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give exactly one of training.steps and training.tokens")
        stages = [(f"batch_ramp.{i}.global_batch", stage.global_batch) for i, stage in enumerate(self.batch_ramp)]
        for name, batch in [*stages, ("global_batch", self.global_batch)]:
            if batch % self.micro_batch:
                below = batch // self.micro_batch * self.micro_batch
                nearest = [multiple for multiple in (below, below + self.micro_batch) if multiple]
                raise ValueError(
                    f"{name} {batch} is not a multiple of micro_batch {self.micro_batch}; "
                    f"the nearest multiples are {' and '.join(map(str, nearest))}"
                )
        if self.compile and self.activation_checkpointing == "low_rank":
            raise ValueError(
                "activation_checkpointing low_rank keeps products of single layers, which a compiled block does not "
                "show; set compile=false, or activation_checkpointing=full"
            )
        return self


class EngineSettings(Settings):
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards over the ranks: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """``cpu`` keeps the optimizer's state and step in host memory (stages 1 to 3)."""
    overlap_communication: bool = False
    """Reduce gradients while the backward pass goes on (stages 1 to 3)."""
    bucket_elements: int | None = Field(default=None, ge=1)
    """Gradient elements reduced in one collective (stages 1 to 3); ``null``: 50,000,000 on GPUs, and on CPUs 500,000,
    which stay in the cache on their way."""
    expert_parallel: int = Field(default=1, ge=1)
    """Neighbouring ranks that hold the experts of every block together, each an equal part of them; tokens travel to
    their experts. The other weights are on every rank as before. ZeRO stages 0 (in fp32), 1 and 2."""
    persistence_threshold: int | None = Field(default=None, ge=0)
    """Stage 3: parameters with fewer elements stay whole on every rank; ``null``: 100,000."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Further DeepSpeed configuration keys, passed through; a key that Headrace sets itself is refused."""

    @model_validator(mode="after")
    def _check(self) -> EngineSettings:
        if self.zero_stage == 0 and self.offload_optimizer != "none":
            raise ValueError("offload_optimizer=cpu needs zero_stage 1, 2 or 3; stage 0 can't offload")
        if self.zero_stage == 0 and self.overlap_communication:
            raise ValueError("overlap_communication needs zero_stage 1, 2 or 3; stage 0 does not overlap")
        if self.zero_stage == 0 and self.bucket_elements is not None:
            raise ValueError("bucket_elements needs zero_stage 1, 2 or 3; leave it out at stage 0")
        if self.zero_stage != 3 and self.persistence_threshold is not None:
            raise ValueError(f"persistence_threshold needs zero_stage 3; leave it out at stage {self.zero_stage}")
        return self


class SecondPlaceSettings(Settings):
    """Where complete checkpoints are copied to, and fetched from when they are newer than those of the run folder."""

    path: str = Field(min_length=1)
    """A folder, or the address of an object store (``s3://bucket/folder``, any that fsspec can write); the run's
    checkpoints lie below it in a folder of its name. Credentials come from where those of data sets do."""
    keep_last: int = Field(default=2, ge=1)
    """How many of the newest complete checkpoints to keep there; ``checkpoint.keep_every`` holds there too."""
    on_failure: Literal["warn", "stop"] = "warn"
    """When a copy can't be made: ``warn`` tells it in log and metrics and trains on, ``stop`` ends the run."""


class CheckpointSettings(Settings):
    every_steps: int | None = Field(default=500, ge=1)
    """Optimizer steps between saves; ``null`` saves only at the end and on a signal."""
    keep_last: int = Field(default=2, ge=1)
    """How many of the newest complete checkpoints to keep."""
    keep_every: int | None = Field(default=None, ge=1)
    """Checkpoints at multiples of this many steps are kept for good; a multiple of ``every_steps``."""
    asynchronous: bool = False
    """Copy the state to the host's memory and write it while training goes on. Takes as much host memory as a rank's
    part of a checkpoint is large. A save that is due while the one before is still being written waits for it."""
    second: SecondPlaceSettings | None = None
    """A second place for complete checkpoints."""

    @model_validator(mode="after")
    def _check(self) -> CheckpointSettings:
        if self.keep_every and (self.every_steps is None or self.keep_every % self.every_steps):
            raise ValueError(f"keep_every {self.keep_every} is not a multiple of every_steps {self.every_steps}")
        return self


class EvaluationSettings(Settings):
    every_steps: int | None = Field(default=500, ge=1)
    """Optimizer steps between evaluations on the held-out split, and one at the end; ``null`` evaluates never."""
    sequences: int | None = Field(default=None, ge=1)
    """Held-out sequences of each source (the first of the split); ``null`` takes all."""

    @model_validator(mode="after")
    def _check(self) -> EvaluationSettings:
        if self.every_steps is None and self.sequences is not None:
            raise ValueError(f"sequences {self.sequences} has no meaning without every_steps; leave it out")
        return self


class MonitorSettings(Settings):
    log_every: int = Field(default=1, ge=1)
    """Optimizer steps between lines of metrics.jsonl and of the progress output."""
    tensorboard: bool = True
    """Write TensorBoard event files."""


class ResilienceSettings(Settings):
    collective_timeout_seconds: int = Field(default=1800, ge=1, le=LONGEST_WAIT)
    """A collective that takes longer means a lost rank: the run ends with an error."""
    hang_multiple: float | None = Field(default=20.0, gt=1)
    """A step that takes this many times the usual one (the median of the last 50) is taken for one that never ends: all
    ranks leave their stacks in the run folder and the run ends, to be started again. ``null`` waits for ever."""
    hang_seconds: float = Field(default=600.0, gt=0)
    """But no step is taken for one before it has lasted so long."""
    straggler_ratio: float = Field(default=1.5, gt=1)
    """A rank whose forward pass, or whose waiting for data, takes this many times the ranks' median is named."""
    straggler_every: int | None = Field(default=100, ge=1)
    """Optimizer steps between looks for such ranks, each over the steps since the last one; ``null`` never looks."""


class Config(Settings):
    """One run. ``pretrain train FILE [section.key=value ...]`` reads it; the run folder keeps the resolved form."""

    run: RunSettings
    data: DataSettings
    model: ModelSettings
    objective: ObjectiveSettings = ObjectiveSettings()
    optimizer: Optimizer = AdamWSettings()
    """A section without ``kind`` is AdamW's."""
    schedule: ScheduleSettings = ScheduleSettings()
    training: TrainingSettings
    engine: EngineSettings = EngineSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    monitor: MonitorSettings = MonitorSettings()
    resilience: ResilienceSettings = ResilienceSettings()
    stability: StabilitySettings = StabilitySettings()
    resume: str = "auto"
    """``auto``: the newest complete checkpoint of the run folder. ``never``: start over; what the folder held is set
    aside. Else the path of a checkpoint, used when the run folder has none of its own."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.training.rewind and self.model.weights_from is None:
            raise ValueError("training.rewind needs model.weights_from, the checkpoint to go back to; give it")
        layers = list(linear_layers(self.model))
        if self.training.activation_checkpointing == "low_rank" and not any(layer.cost.products for layer in layers):
            kinds = ", ".join(sorted({layer.method.kind for layer in layers}))
            raise ValueError(
                "training.activation_checkpointing low_rank keeps the r-dimensional activations of factorised layers, "
                f"and model.linear makes none (its layers are {kinds}); use full or none, or a kind such as cola"
            )
        if self.stability.deterministic and self.training.compile:
            raise ValueError(
                "stability.deterministic can't be kept with training.compile, whose kernels are chosen by how long "
                "they take; set one of them to false"
            )
        _check_expert_parallel(self.engine, self.model, self.training.precision)
        check_balancing(self.objective, self.model)
        if self.model.mup:
            self.optimizer.mup_rate((1, 1), (1, 1))  # an optimizer without a rule refuses
            if not self.objective.loss.is_likelihood:
                raise ValueError(
                    f"objective.loss {self.objective.loss.kind} is the same for logits times any constant, as muP's "
                    "multiplier of the head is, and no source says what its rates are under muP; leave out model.mup, "
                    "or take objective.loss=cross_entropy"
                )
        return self

    @property
    def run_folder(self) -> Path:
        return Path(self.run.folder) / self.run.name

    @cached_property
    def batch_plan(self) -> BatchPlan:
        """Which positions each step takes."""
        ramp = tuple((stage.steps, stage.global_batch) for stage in self.training.batch_ramp)
        return BatchPlan(self.training.global_batch, ramp, self.data.skip_ranges)

    @cached_property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run: the first number that consumes ``training.tokens``, where that is given."""
        if self.training.steps is not None:
            return self.training.steps
        assert self.training.tokens is not None
        sequences = -(-self.training.tokens // self.data.seq_len)
        plan = replace(self.batch_plan, skip_ranges=())
        whole = plan.step_of(sequences)
        return whole if plan.start_of(whole) == sequences else whole + 1


def _check_expert_parallel(engine: EngineSettings, model: ModelSettings, precision: str) -> None:
    """Raise ValueError where experts can't be divided; what the number of ranks allows, the engine checks."""
    size = engine.expert_parallel
    if size == 1:
        return
    told = f"engine.expert_parallel {size} divides experts among ranks, and "
    if model.experts is None:
        raise ValueError(f"{told}model.experts is null; leave it out")
    if model.experts.number % size:
        fitting = [str(ranks) for ranks in range(1, model.experts.number + 1) if model.experts.number % ranks == 0]
        raise ValueError(f"{told}does not divide model.experts.number {model.experts.number}; {', '.join(fitting)} do")
    if engine.zero_stage == 3:
        raise ValueError(
            f"{told}DeepSpeed 0.19.8 refuses its expert groups at zero_stage 3, where every expert is split over all "
            "ranks anyhow, like any other weight; set expert_parallel=1, or zero_stage 1 or 2"
        )
    if engine.zero_stage == 0 and precision == "bf16":
        raise ValueError(
            f"{told}DeepSpeed 0.19.8 leaves such experts out of the gradient's norm at zero_stage 0 in bf16, and clips "
            "by a wrong one; set zero_stage 1 or 2, or precision=fp32"
        )


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a run's configuration. Raises UserError that names every key, value and nearest valid key."""
    return load_settings(Config, path, overrides)
