"""The engine: what Headrace asks of DeepSpeed. Nothing outside this folder knows DeepSpeed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline import Batch
from pretrain.config import Config
from pretrain.distributed import Distributed, set_timeout_of_all_groups
from pretrain.model import Decoder, Outputs
from pretrain.model.experts.noise import noise_keys
from pretrain.model.experts.router import Router
from pretrain.model.linear.head import Head, RowStatistics
from pretrain.model.mup import width_scaling
from pretrain.model.scheduled import schedules
from pretrain.optimizer import parameter_groups

from .deepspeed_config import clips_itself, deepspeed_config
from .deepspeed_module import import_deepspeed
from .expert_groups import expert_groups, shape_of
from .finite import non_finite_parts
from .gate import UpdateGate
from .gradients import forget_gradients, scale_gradients
from .initial import Given, fill_model
from .masters import write_masters
from .shards import attach_matrices, shards_of
from .watch import GradientWatch


@contextmanager
def idle(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The optimizer takes no step in here: some of DeepSpeed's make one, on zero gradients, while they are built."""
    # hides the method of the class for this one object, which types have no word for
    optimizer.step = lambda closure=None: None  # type: ignore[method-assign, assignment]
    yield
    del optimizer.step


class Engine:
    """A decoder under DeepSpeed ZeRO: forward, backward, step, save and load.

    Gradients are averaged over the ranks and summed over the micro-steps of an optimizer step; the losses handed to
    :meth:`backward` carry the whole normalisation (``objective.terms.engine_loss``).

    Args:
        config: the run's configuration, checked for this number of ranks.
        vocab_size: of the data's tokenizer.
        ranks: this process among its peers.
        initial: values to start with instead of drawing them; only rank 0 reads from it.
        empty: :meth:`load` comes next, so that making initial values, which may take long, would be in vain.
    """

    def __init__(
        self, config: Config, vocab_size: int, ranks: Distributed, initial: Given | None = None, empty: bool = False
    ) -> None:
        deepspeed = import_deepspeed()
        settings = deepspeed_config(config, ranks.world_size)
        # an earlier engine of this process dies here and not within an import: its finalizer imports, which Python 3.11
        # answers there with a KeyError of its import locks (python/cpython#91351)
        gc.collect()
        self._clip_norm = config.optimizer.clip_norm
        self._clips_itself = clips_itself(config)
        self._stage = config.engine.zero_stage
        self._keeps_own_masters = self._stage == 0 and config.training.precision == "bf16"
        self._seed = config.run.seed
        self._jitters = config.model.experts is not None and config.model.experts.jitter > 0
        self._left = 0
        """Micro-steps of the current optimizer step whose backward pass is still to come."""
        self._rows = RowStatistics() if config.objective.loss.from_moments else None
        self.ranks = ranks
        deepspeed.init_distributed(dist_backend="nccl" if ranks.device.type == "cuda" else "gloo", verbose=False)
        self._experts = expert_groups(config.engine.expert_parallel, ranks)
        model = self._build(deepspeed, config, vocab_size, settings)
        self._experts.mark(model)
        self._watch = GradientWatch(model.embedding, ranks.device) if config.stability.rerun else None
        if isinstance(model.head, Head):
            model.head.statistics = self._rows
        if not empty:
            # the same for every stage and number of ranks
            whole = deepspeed.zero.GatheredParameters if self._stage == 3 else None
            fill_model(model, config.run.seed, ranks, initial, whole, self._experts)
        if config.training.compile:
            for block in model.blocks:
                block.compile()
        scaling = partial(width_scaling, settings=config.model, rate=config.optimizer.mup_rate)
        self._schedules = schedules(model)
        groups = parameter_groups(model.named_parameters(), config.optimizer, scaling, shape_of)
        optimizer = config.optimizer.build(self._experts.apart(groups))
        with idle(optimizer):
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings, dist_init_required=False
            )
        shapes = {name: self._experts.whole_shape(parameter) for name, parameter in model.named_parameters()}
        shards = shards_of(self._optimizer, optimizer.param_groups, model, self._stage, ranks, self._experts)
        attach_matrices(optimizer, shards, shapes, self._stage, ranks, self._experts)
        self._gate = UpdateGate(optimizer)
        self._non_finite = partial(non_finite_parts, shards, optimizer)
        if initial is not None and config.training.precision == "bf16":
            write_masters(model, initial, self._stage, ranks, self._experts, self._master())
        set_timeout_of_all_groups(config.resilience.collective_timeout_seconds)
        if self._stage == 0 and ranks.world_size == 1:
            self._engine.enable_backward_allreduce = False  # copies every gradient twice to reduce it with nobody
        from .saving import EngineCheckpoints  # imports DeepSpeed, which has to find its accelerator chosen

        self.checkpoints = EngineCheckpoints(self._engine, optimizer, shards, shapes, self._stage, ranks, self._experts)

    def _build(self, deepspeed: Any, config: Config, vocab_size: int, settings: dict[str, Any]) -> Decoder:
        """The decoder without values."""
        # under ZeRO-3 every parameter is split over the ranks as soon as it is made: no rank ever holds the whole model
        with deepspeed.zero.Init(config_dict_or_path=settings) if self._stage == 3 else nullcontext():
            return Decoder(config.model, vocab_size, config.training.activation_checkpointing, self._experts.across)

    def training_forward(self, batch: Batch) -> Outputs:
        """Logits [b, T, V] of a batch on this rank's device (or their moments, where the loss takes these), and, of a
        model with experts, how its tokens were routed: of a training step, or of a scoring pass before it, which routes
        them to the bit alike."""
        keys = noise_keys(self._seed, batch.run_positions) if self._jitters else None
        labels = batch.labels if self._rows else None
        inputs = (batch.tokens, batch.positions, batch.document_ids, batch.single_document)
        outputs: Outputs = self._engine(*inputs, batch.loss_mask, keys, labels, of_step=True)
        return outputs

    def forward(self, batch: Batch) -> Tensor:
        """Logits [b, T, V] of a batch on this rank's device, for an evaluation: nothing is counted, and experts choose
        from the tokens that they choose from in training."""
        inputs = (batch.tokens, batch.positions, batch.document_ids, batch.single_document)
        logits: Tensor = self._engine(*inputs, batch.loss_mask)
        return logits

    def evaluating(self, evaluating: bool) -> None:
        self._engine.train(not evaluating)

    def update_buffers(self, step: int) -> None:
        """Let the buffers that follow a schedule change, before optimizer step ``step`` (from 0). Collective."""
        master = self._master()
        for schedule, modules in self._schedules:
            if schedule.due(step):
                schedule.update(step, modules, lambda name: master(self._engine.module.get_parameter(name)).detach())

    @torch.no_grad()
    def move_selection_bias(self, moves: Tensor) -> None:
        """Add to the selection biases of the routers, [blocks with experts, E]; the same on every rank."""
        for router, move in zip(self._routers(), moves, strict=True):
            router.selection_bias += move.to(router.selection_bias)

    def selection_bias(self) -> Tensor:
        """The selection biases of the routers, [blocks with experts, E] fp32 on the CPU."""
        return torch.stack([router.selection_bias for router in self._routers()]).cpu()

    def _routers(self) -> list[Router]:
        return [module for module in self._engine.module.modules() if isinstance(module, Router)]

    def begin_step(self, micro_steps: int) -> None:
        """Say how many micro-steps the optimizer step that begins has; a batch ramp changes it on the way."""
        self._left = micro_steps
        if self._watch:
            self._watch.begin()
        if self._rows:
            self._rows.begin(last=micro_steps == 1)
        self._engine._config.gradient_accumulation_steps = micro_steps
        if hasattr(self._engine.optimizer, "gradient_accumulation_steps"):
            self._engine.optimizer.gradient_accumulation_steps = micro_steps
        self._engine.set_gradient_accumulation_boundary(micro_steps == 1)

    @property
    def own_gradient(self) -> Tensor:
        """Sum of squares of what this rank's backward passes of the step have brought back to the embedding, a scalar
        on the device; where ``stability.rerun`` asks for it."""
        assert self._watch is not None
        return self._watch.energy

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of ``loss`` (scalar); reduces over the ranks after the step's last micro-step."""
        self._engine.backward(loss, scale_wrt_gas=False)
        self._left -= 1
        if self._left:
            if self._rows:
                self._rows.last = self._left == 1
            self._engine.step()  # only counts the micro-step
            self._engine.set_gradient_accumulation_boundary(self._left == 1)

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply the accumulated gradient by ``factor`` (scalar, on the device); after the last :meth:`backward`."""
        scale_gradients(self._engine, factor)

    def step(
        self, learning_rate: float, accept: Callable[[Tensor | float], bool] = lambda norm: True
    ) -> Tensor | float:
        """Clip the gradient by its global norm and update the parameters, if that is accepted.

        Args:
            learning_rate: of this step; a group's own ``lr_scale`` multiplies it.
            accept: called once, with the norm, when nothing was changed yet; must answer the same on every rank. If
                False, parameters and optimizer stay as they are and the gradient is gone. Where the gradient is not
                finite, DeepSpeed may leave the update out whatever it answers.

        Returns:
            the norm of the whole gradient before clipping; infinite where the gradient is not finite and DeepSpeed has
            found out.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        own = self._clip() if self._clips_itself else None

        def norm() -> Tensor | float:
            # of DeepSpeed's optimizer, which has it before it updates; the engine itself takes it over afterwards
            found: Tensor | float = self._engine.optimizer._global_grad_norm if own is None else own
            return found

        with self._gate.deciding(lambda: accept(norm())):
            self._engine.step()
        if not self._gate.passed:
            forget_gradients(self._engine)
        return norm()

    def _clip(self) -> Tensor:
        parameters = [p for p in self._engine.module.parameters() if p.grad is not None]
        norm = self._experts.norm(parameters)
        if self._clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)
        return norm

    def save(self, folder: Path) -> list[Path]:
        """Write this rank's part of the engine's state below ``folder`` and flush it to the disk.

        Collective. A rank whose disk fails still takes part in the others' barriers.

        Returns:
            the files that this rank wrote.

        Raises:
            OSError: this rank could not write (on the rank concerned only).
        """
        return self.begin_save(folder, later=False)()

    def begin_save(self, folder: Path, later: bool) -> Callable[[], list[Path]]:
        """The collective part of :meth:`save`.

        Args:
            later: copy this rank's part to the host's memory instead of writing it, so that training may go on.

        Returns:
            what ends it: writes what was copied, returns and raises what :meth:`save` does. It communicates with
            nobody, and may be called in any thread, once, before the next save.
        """
        return self.checkpoints.begin_save(folder, later)

    def load(self, folder: Path) -> None:
        """Restore what :meth:`save` wrote, on any number of ranks and ZeRO stage. Collective.

        Where tensors lie as they did when it was saved, DeepSpeed reads its own files; else every rank takes what it
        needs by name. Both give the same bits.
        """
        self.checkpoints.load(folder)

    def non_finite(self) -> list[str]:
        """Names of the parameters of which this rank's optimizer holds a weight, or state, that is not finite."""
        return self._non_finite()

    def full_parameters(self) -> dict[str, Tensor]:
        """Every parameter, whole, in fp32 from the optimizer's own copy, on the CPU. Collective."""
        return self._whole(self._master())

    def _master(self) -> Callable[[nn.Parameter], Tensor]:
        """A function from a parameter to the optimizer's own copy of it, whole, in fp32. Collective."""
        if self._keeps_own_masters:
            pairs = zip(self._optimizer.fp16_groups, self._optimizer.fp32_groups, strict=True)
            masters = {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
            return lambda parameter: masters[id(parameter)]
        if self._stage == 0:
            return lambda parameter: parameter.data
        gathered: Callable[[nn.Parameter], Tensor] = import_deepspeed().utils.safe_get_full_fp32_param
        return gathered

    def full_gradients(self) -> dict[str, Tensor]:
        """Every reduced gradient, whole, in fp32, on the CPU; between the last backward and the step. Collective."""
        if self._stage == 0:
            return self._whole(lambda parameter: parameter.grad)
        return self._whole(import_deepspeed().utils.safe_get_full_grad)

    def _whole(self, read: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
        whole: dict[str, Tensor] = {}
        for name, parameter in self._engine.module.named_parameters():
            value = read(parameter)
            if value is not None:
                whole[name] = self._experts.whole(parameter, value.detach().float()).cpu().clone()
        return whole
