"""Optimizer steps two ways: through our engine and objective, and as a plain PyTorch loop on one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.batches import Batch, make_batch
from data_pipeline.settings import build_settings
from pretrain.config import Config
from pretrain.distributed import Distributed
from pretrain.model import Decoder, initialize_
from pretrain.model.experts.noise import noise_keys
from pretrain.model.experts.router import Router
from pretrain.optimizer import AdamWSettings

if TYPE_CHECKING:
    from pretrain.objective import LossRange, StepStatistics

VOCABULARY, LENGTH, EOS, GLOBAL_BATCH, STEPS = 64, 24, 2, 8, 3
RATES = (1e-3, 7e-4, 3e-4)


def tiny_config(**sections: dict[str, Any]) -> Config:
    """A configuration with a model of about 20,000 parameters; ``sections`` are merged over it."""
    plain: dict[str, dict[str, Any]] = {
        "run": {"name": "tiny", "seed": 7},
        "data": {"sources": {"a": {"path": "nowhere"}, "b": {"path": "nowhere"}}, "seq_len": LENGTH},
        "model": {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "intermediate_size": 48,
            # large initial weights spread the losses over nats: where they nearly agree, the weights of linupper
            # magnify the last bit of a loss, in any implementation
            "init_std": 0.4,
        },
        "optimizer": {"weight_decay": 0.1, "clip_norm": 0.5},
        "training": {"steps": STEPS, "global_batch": GLOBAL_BATCH, "micro_batch": 1, "precision": "fp32"},
        "engine": {"zero_stage": 0},
    }
    for name, content in sections.items():
        plain[name] = {**plain.get(name, {}), **content}
    return build_settings(Config, plain, "test")


def ragged_rows(step: int, count: int = GLOBAL_BATCH) -> np.ndarray:
    """[count, LENGTH + 1] tokens whose rows hold 4 to 23 labels; the last row of odd steps holds none."""
    random = np.random.default_rng(100 + step)
    rows = random.integers(3, VOCABULARY, (count, LENGTH + 1))
    for row, labels in zip(rows, random.permutation(np.linspace(4, 23, count).astype(int)), strict=True):
        row[labels + 1 :] = EOS
        row[labels // 2] = EOS
    if step % 2:
        rows[-1] = EOS
    return rows.astype(np.uint16)


def batch_of(step: int, positions: np.ndarray, count: int = GLOBAL_BATCH) -> Batch:
    """The batch that holds these of the ``count`` rows of step ``step``; the first half of the rows is of source 0."""
    rows = ragged_rows(step, count)[positions]
    sources = (positions >= count // 2).astype(np.int64)
    samples = np.where((rows == EOS).all(axis=1), -1, positions).astype(np.int64)
    return make_batch(rows, EOS, sources, samples, step * count + positions.astype(np.int64))


def micro_batches(step: int, ranks: Distributed, micro_batch: int, batch: int = GLOBAL_BATCH) -> list[Batch]:
    """This rank's micro-batches, by the rule of docs/architecture.md: micro-step, then rank, then row."""
    together = ranks.world_size * micro_batch
    starts = range(ranks.rank * micro_batch, batch, together)
    count = max(GLOBAL_BATCH, batch)
    return [batch_of(step, np.arange(start, start + micro_batch), count) for start in starts]


class Given:
    """Initial values that a test gives, as ``pretrain.initial_weights.Weights`` has them."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._values = values
        self.shapes = {name: tuple(value.shape) for name, value in values.items()}

    def read(self, name: str) -> Tensor:
        return self._values[name]


class EngineRun:
    """Optimizer steps of the engine, one at a time, as the trainer makes them.

    Args:
        config: of the run.
        ranks: this process among its peers.
        initial: values that are taken in place of the drawn ones.
        empty: a checkpoint is loaded next.
    """

    def __init__(
        self, config: Config, ranks: Distributed, initial: Mapping[str, Tensor] | None = None, empty: bool = False
    ) -> None:
        from pretrain.engine import Engine
        from pretrain.objective import Objective

        self.config, self.ranks = config, ranks
        self.engine = Engine(config, VOCABULARY, ranks, Given(initial) if initial else None, empty)
        self.objective = Objective(config.objective, 2, ranks)
        self.loss_range: LossRange | None = None
        self.frequencies: dict[str, list[list[float]]] | None = None
        """Both of the step before; parts of a run's state."""

    def backward(self, step: int) -> None:
        """Forward and backward passes of a step: the gradient is reduced and final."""
        batches = micro_batches(step, self.ranks, self.config.training.micro_batch, self.config.batch_plan.batch(step))
        self.engine.update_buffers(step)
        self.engine.begin_step(len(batches))
        self.objective.begin_step(step, batches, self.loss_range, self.frequencies)
        if self.objective.scores_first:
            self.engine.evaluating(True)
            with torch.no_grad():
                for batch in batches:
                    logits, routing = self.engine.training_forward(batch)
                    self.objective.score(logits, batch, routing)
            self.engine.evaluating(False)
        for batch in batches:
            logits, routing = self.engine.training_forward(batch)
            self.engine.backward(self.objective.micro_step(logits, batch, routing))
        if (factor := self.objective.gradient_factor()) is not None:
            self.engine.scale_gradients(factor)

    def update(self, step: int) -> tuple[float, StepStatistics]:
        """The update after :meth:`backward`: the gradient's norm, and what the step was."""
        norm = float(self.engine.step(RATES[step % len(RATES)]))
        statistics = self.objective.end_step()
        self.loss_range = statistics.loss_range
        if statistics.routing is not None:
            self.frequencies = statistics.routing.frequencies
            if self.config.objective.balancing.bias is not None:
                moves = self.config.objective.balancing.bias.moves(step, statistics.routing.loads.sum(axis=1))
                self.engine.move_selection_bias(torch.from_numpy(moves))
        return norm, statistics

    def step(self, step: int) -> tuple[float, float, float]:
        """A whole step: its loss, objective and gradient norm."""
        self.backward(step)
        norm, statistics = self.update(step)
        return statistics.loss, statistics.objective, norm


def run_engine(config: Config, ranks: Distributed, initial: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """STEPS optimizer steps; the reduced gradient of the first and the parameters after the last, whole, fp32.

    ``initial`` values are taken in place of the drawn ones.
    """
    run = EngineRun(config, ranks, initial)
    seen: dict[str, Any] = {"losses": [], "objectives": [], "norms": [], "holes": []}
    for step in range(STEPS):
        run.backward(step)
        if step == 0:
            seen["gradients"] = run.engine.full_gradients()
        norm, statistics = run.update(step)
        seen["norms"].append(norm)
        seen["losses"].append(statistics.loss)
        seen["objectives"].append(statistics.objective)
        seen["holes"].append(statistics.holes)
    seen["parameters"] = run.engine.full_parameters()
    return seen


def plain_adamw(masters: dict[str, Tensor], config: Config) -> Callable[[float], None]:
    """torch's AdamW over the fp32 weights: a function of the learning rate that takes one step by their ``grad``."""
    settings = config.optimizer
    assert isinstance(settings, AdamWSettings)
    exempt = {name for name in masters if "norm" in name or "embedding" in name}
    optimizer = torch.optim.AdamW(
        [
            {"params": [masters[name] for name in masters if name not in exempt]},
            {"params": [masters[name] for name in masters if name in exempt], "weight_decay": 0.0},
        ],
        weight_decay=settings.weight_decay,
        betas=settings.betas,
        eps=settings.eps,
    )

    def step(rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()

    return step


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def run_plain(
    config: Config,
    group_size: int,
    objective: Callable[[Tensor, Batch, Config, int], Tensor] | None = None,
    optimizer: Callable[[dict[str, Tensor], Config], Callable[[float], None]] = plain_adamw,
    before_step: Callable[[Decoder, dict[str, Tensor], int], None] = lambda model, masters, step: None,
    initial: Mapping[str, Tensor] | None = None,
    balancing: Any = None,
    token_losses: Callable[[Tensor, Tensor], Tensor] = cross_entropies,
) -> dict[str, Any]:
    """The same steps as a plain loop: one process, the whole batch at once, weights by the paper's formula in numpy.

    Args:
        group_size: sequences over which losses are normalised.
        objective: from the logits of the whole batch to what the step minimises; ``None``: :class:`PlainObjective`.
        optimizer: from the fp32 weights by name to a function of the learning rate that takes one step.
        before_step: what is done to the model before a step, by the fp32 weights: (model, weights by name, step).
        initial: values in place of the drawn ones.
        balancing: ``methods.experts.PlainBalancing``, where the routers of the model are balanced.
        token_losses: from logits [n, V] and labels [n] to losses [n], of which ``losses`` are the means.
    """
    model = Decoder(config.model, VOCABULARY)
    initialize_(model, config.run.seed)
    model.load_state_dict(initial or {}, strict=False)
    model = model.to(torch.bfloat16 if config.training.precision == "bf16" else torch.float32)
    masters = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    update = optimizer(masters, config)
    objective = objective or PlainObjective()
    routed: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda module, inputs, logits: routed.append(logits))
    settings = config.optimizer
    seen: dict[str, Any] = {"losses": [], "objectives": [], "norms": []}
    seen["initial"] = {name: p.clone() for name, p in masters.items()}
    for step in range(STEPS):
        size = config.batch_plan.batch(step)
        batch = batch_of(step, np.arange(size), max(GLOBAL_BATCH, size))
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(masters[name])
        before_step(model, masters, step)
        model.zero_grad()
        keys = noise_keys(config.run.seed, batch.run_positions)
        inputs = (batch.tokens, batch.positions, batch.document_ids, batch.single_document, batch.loss_mask, keys)
        logits = model(*inputs, of_step=True).logits.float()
        loss = objective(logits, batch, config, group_size)
        if balancing is not None:
            loss = loss + balancing(routed, batch, config, group_size, getattr(objective, "relative", None))
            balancing.end_step(model, routed, batch, config)
        routed.clear()
        loss.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            masters[name].grad = p.grad.float().clone()
        if step == 0:
            seen["gradients"] = {name: p.grad.clone() for name, p in masters.items() if p.grad is not None}
        norm = torch.sqrt(sum((p.grad.square().sum() for p in masters.values() if p.grad is not None), torch.zeros(())))
        for p in masters.values():
            assert p.grad is not None
            p.grad *= min(1.0, settings.clip_norm / (norm.item() + 1e-6))
        update(RATES[step])
        seen["norms"].append(norm.item())
        seen["objectives"].append(loss.item())
        with torch.no_grad():
            seen["losses"].append(token_losses(logits[batch.loss_mask], batch.labels[batch.loss_mask]).mean().item())
    seen["parameters"] = masters
    return seen


PLAIN_SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linupper": lambda h: np.minimum(h + 1, 1),
    "quadratic": lambda h: 1 - h**2,
    "extremes": np.abs,
}


class PlainObjective:
    """The objective written out sequence by sequence, without any code of pretrain.objective; one object for one run,
    for it remembers the losses of the step before."""

    def __init__(self, token_losses: Callable[[Tensor, Tensor], Tensor] = cross_entropies) -> None:
        self.token_losses = token_losses
        self.step = 0
        self.before: np.ndarray = np.array([])

    def __call__(self, logits: Tensor, batch: Batch, config: Config, group_size: int) -> Tensor:
        settings = config.objective
        means, counts = [], []
        rows = len(batch.tokens)
        for row in range(rows):
            mask = batch.loss_mask[row]
            found = self.token_losses(logits[row][mask], batch.labels[row][mask])
            counts.append(len(found))
            means.append(found.mean() if len(found) else logits.sum() * 0.0)
        losses = np.array([mean.item() for mean in means], float)
        weights = np.zeros(rows)
        size = group_size if settings.reweighting.group == "micro_step" else rows
        for start in range(0, rows, size):
            members = [i for i in range(start, start + size) if counts[i]]
            shares = np.array([counts[i] if settings.average == "token" else 1 for i in members], float)
            weights[members] = self.weights(losses[members], shares, config)
        self.step += 1
        self.relative = weights / np.maximum(counts, 1)
        self.before = losses[np.array(counts) > 0]
        total = sum(counts) if settings.average == "token" else sum(count > 0 for count in counts)
        loss = sum((float(w) * mean for w, mean in zip(weights, means, strict=True)), torch.zeros(())) / total
        if settings.z_loss:
            squares = torch.logsumexp(logits, -1).square() * batch.loss_mask
            loss = loss + settings.z_loss * squares.sum() / sum(counts)
        return loss

    def weights(self, losses: np.ndarray, shares: np.ndarray, config: Config) -> np.ndarray:
        """What each member of a group counts, ``shares`` in all."""
        settings = config.objective.reweighting
        within = self.before if settings.group == "global_batch_one_pass" else losses
        if settings.strategy.kind == "uniform" or self.step < settings.start_step or not len(within):
            return shares
        h = (2 * losses - within.max() - within.min()) / max(within.max() - within.min(), 1e-6)
        h = np.clip(h, -1, 1)
        importances = np.exp(PLAIN_SCORES[settings.strategy.kind](h) / settings.temperature)
        low, high = 0.0, 1e9
        for _ in range(200 if settings.cap else 0):
            level = (low + high) / 2
            sums = (np.minimum(level * importances, settings.cap) * shares).sum()
            low, high = (level, high) if sums < shares.sum() else (low, level)
        if settings.cap:
            return np.minimum(low * importances, settings.cap) * shares
        return importances * shares / (importances * shares).sum() * shares.sum()


def relative_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """||one - other|| / ||other|| over all tensors together, in float64."""
    assert one.keys() == other.keys()
    squares = sum(float((one[name].double() - other[name].double()).square().sum()) for name in one)
    whole = sum(float(other[name].double().square().sum()) for name in other)
    return float(np.sqrt(squares / whole))
