"""The groups in which samples are weighed: micro-step, global batch, one pass; dropped samples; nothing waits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipeline.batches import Batch
from data_pipeline.errors import UserError
from data_pipeline.settings import build_settings
from pretrain.check import check_run, warnings
from pretrain.distributed import Distributed
from pretrain.objective import LossRange, Objective, ObjectiveSettings, StepStatistics
from tests.ranks import run_on_ranks

from .steps import GLOBAL_BATCH, LENGTH, VOCABULARY, batch_of, tiny_config

ALONE = Distributed(0, 1, torch.device("cpu"))
GROUPS = ("micro_step", "global_batch", "global_batch_one_pass")


def settings(group: str, average: str = "token", z_loss: float = 0.0, **given: Any) -> ObjectiveSettings:
    reweighting = {"strategy": "linupper", "temperature": 0.4, "group": group, **given}
    return build_settings(ObjectiveSettings, {"average": average, "z_loss": z_loss, "reweighting": reweighting}, "test")


@dataclass
class Outcome:
    gradient: Tensor
    """[GLOBAL_BATCH, T, V], of the step's objective by all rows' logits."""
    statistics: StepStatistics
    losses: list[Tensor]


def logits_of(step: int) -> Tensor:
    """Of the rows of a step, by a model that is not there: spread, so that losses differ by nats."""
    return 3 * torch.randn(GLOBAL_BATCH, LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(step))


def take_step(
    chosen: ObjectiveSettings,
    micro_steps: int,
    step: int = 1,
    previous: LossRange | None = None,
    logits: Tensor | None = None,
    ranks: Distributed = ALONE,
) -> Outcome:
    """One optimizer step on this rank; the gradients of other ranks' rows stay 0."""
    logits = (logits_of(step) if logits is None else logits).requires_grad_()
    objective, together = Objective(chosen, 2, ranks), GLOBAL_BATCH // micro_steps
    rows = np.arange(GLOBAL_BATCH).reshape(micro_steps, ranks.world_size, -1)[:, ranks.rank]
    assert rows.shape[1] * ranks.world_size == together
    batches = [batch_of(step, own) for own in rows]
    objective.begin_step(step, batches, previous)
    if objective.scores_first:
        with torch.no_grad():
            for own, batch in zip(rows, batches, strict=True):
                objective.score(logits[own], batch)
    losses = []
    for own, batch in zip(rows, batches, strict=True):
        # a value of its own for each micro-step, as a model's output is
        losses.append(objective.micro_step(logits[own] * 1.0, batch))
        losses[-1].backward()
    assert logits.grad is not None
    if (factor := objective.gradient_factor()) is not None:
        logits.grad *= factor
    return Outcome(logits.grad / ranks.world_size, objective.end_step(), losses)


def plain_losses(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean loss and number of labels of each row, in numpy."""
    batch, values = batch_of(step, np.arange(GLOBAL_BATCH)), logits_of(step).double().numpy()
    log_p = values - np.log(np.exp(values).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p, batch.labels.numpy()[..., None], -1)[..., 0]
    mask = batch.loss_mask.numpy()
    return -(picked * mask).sum(1) / np.maximum(mask.sum(1), 1), mask.sum(1)


def plain_weights(step: int, lowest: float, highest: float) -> np.ndarray:
    """Of the whole step as one group, in this range, r = 0.4, LinUpper."""
    losses, counts = plain_losses(step)
    h = np.clip((2 * losses - lowest - highest) / (highest - lowest), -1, 1)
    importances = np.exp(np.minimum(h + 1, 1) / 0.4) * (counts > 0)
    return importances * counts.sum() / (importances * counts).sum()


def found_weights(statistics: StepStatistics) -> np.ndarray:
    """[GLOBAL_BATCH] by position."""
    assert statistics.weights is not None
    order = statistics.weights.samples.positions.flatten().argsort()
    return statistics.weights.weights.flatten()[order].numpy()


def range_of(step: int) -> LossRange:
    found = take_step(settings("global_batch_one_pass"), 4, step).statistics.loss_range
    assert found is not None
    return found


def test_the_global_batch_is_one_group_however_it_is_split() -> None:
    losses, counts = plain_losses(1)
    expected = plain_weights(1, losses[counts > 0].min(), losses[counts > 0].max())
    outcomes = [take_step(settings("global_batch"), micro_steps) for micro_steps in (1, 2, 8)]
    for outcome in outcomes:
        assert found_weights(outcome.statistics) == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(outcome.gradient, outcomes[0].gradient, rtol=1e-5, atol=1e-8)
        assert outcome.statistics.objective == pytest.approx(float(expected @ (losses * counts)) / counts.sum())
    assert found_weights(take_step(settings("micro_step"), 2).statistics) != pytest.approx(expected, rel=1e-2)


def test_one_pass_places_losses_in_the_range_of_the_step_before() -> None:
    previous = range_of(3)
    losses, counts = plain_losses(3)
    assert (previous.lowest, previous.highest) == pytest.approx((losses[counts > 0].min(), losses[counts > 0].max()))
    expected = plain_weights(4, previous.lowest, previous.highest)
    outcomes = [take_step(settings("global_batch_one_pass"), steps, 4, previous) for steps in (1, 2, 8)]
    now, counts = plain_losses(4)
    for outcome in outcomes:
        assert found_weights(outcome.statistics) == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(outcome.gradient, outcomes[0].gradient, rtol=1e-5, atol=1e-8)
        assert outcome.statistics.objective == pytest.approx(float(expected @ (now * counts)) / counts.sum())
    assert expected.max() > 1.2


def test_one_pass_with_one_micro_step_multiplies_nothing() -> None:
    """So that terms of other denominators may stand beside it."""
    previous, chosen = range_of(3), settings("global_batch_one_pass", z_loss=0.1)
    losses, counts = plain_losses(4)
    mask, values = batch_of(4, np.arange(GLOBAL_BATCH)).loss_mask.numpy(), logits_of(4).double().numpy()
    squares = (np.log(np.exp(values).sum(-1)) ** 2)[mask].mean()
    weighed = float(plain_weights(4, previous.lowest, previous.highest) @ (losses * counts)) / counts.sum()
    outcome = take_step(chosen, 1, 4, previous)
    assert outcome.statistics.objective == pytest.approx(weighed + 0.1 * squares)
    assert outcome.losses[0].item() == pytest.approx(outcome.statistics.objective)


def test_one_pass_accumulates_near_the_final_scale() -> None:
    """The loss handed to the engine, before the factor is known, is of the size of a loss."""
    for temperature in (0.02, 0.4, 50.0):
        chosen = settings("global_batch_one_pass", temperature=temperature)
        previous = take_step(chosen, 8, 3).statistics.loss_range
        outcome = take_step(chosen, 8, 4, previous)
        handed = sum(loss.item() for loss in outcome.losses)
        assert 0.3 < handed / outcome.statistics.objective < 3


def test_one_pass_is_right_on_any_scale() -> None:
    """A resume with another temperature finds the scale of the old one; e^100 would not fit into fp32."""
    chosen, previous = settings("global_batch_one_pass", temperature=0.5), range_of(3)
    exact = take_step(chosen, 4, 4, previous)
    for wrong in (-40.0, 40.0):
        scale = LossRange(previous.lowest, previous.highest, previous.log_mean_importance + wrong)
        moved = take_step(chosen, 4, 4, scale)
        torch.testing.assert_close(moved.gradient, exact.gradient, rtol=1e-5, atol=1e-8)
        assert moved.statistics.objective == pytest.approx(exact.statistics.objective)
    for micro_steps, wrong in itertools.product((1, 4), (-1e3, 1e3)):
        scale = LossRange(previous.lowest, previous.highest, wrong)
        assert take_step(chosen, micro_steps, 4, scale).gradient.isfinite().all()


def test_the_first_one_pass_step_is_uniform_to_the_bit() -> None:
    uniform = take_step(build_settings(ObjectiveSettings, {}, "test"), 4)
    first = take_step(settings("global_batch_one_pass"), 4)
    assert torch.equal(first.gradient, uniform.gradient)
    assert first.statistics.objective == uniform.statistics.objective
    assert set(found_weights(first.statistics).tolist()) == {0.0, 1.0}


def test_the_range_is_kept_before_reweighting_begins_and_where_no_loss_is_seen() -> None:
    late = settings("global_batch_one_pass", start_step=6)
    outcome = take_step(late, 4, 5)
    assert outcome.statistics.weights is None
    losses, counts = plain_losses(5)
    seen = outcome.statistics.loss_range
    assert seen is not None
    assert (seen.lowest, seen.highest) == pytest.approx((losses[counts > 0].min(), losses[counts > 0].max()))
    h = np.clip((2 * losses - seen.lowest - seen.highest) / (seen.highest - seen.lowest), -1, 1)
    mean = (np.exp(np.minimum(h + 1, 1) / 0.4) * counts).sum() / counts.sum()
    assert seen.log_mean_importance == pytest.approx(math.log(mean)), "under the temperature of the step that uses it"
    blind = take_step(late, 4, 7, seen, torch.full((GLOBAL_BATCH, LENGTH, VOCABULARY), math.nan))
    assert blind.statistics.loss_range == seen
    assert take_step(settings("micro_step"), 4, 5, seen).statistics.loss_range is None


@pytest.mark.parametrize("micro_steps", [1, 4])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("off", [{"temperature": math.inf}, {"start_step": 2}])
def test_off_is_uniform_to_the_bit(group: str, micro_steps: int, off: dict[str, Any]) -> None:
    """Law 9."""
    uniform = take_step(build_settings(ObjectiveSettings, {}, "test"), micro_steps)
    other = take_step(settings(group, **off), micro_steps, previous=LossRange(1.0, 9.0, 0.5))
    assert torch.equal(other.gradient, uniform.gradient)
    assert [loss.item() for loss in other.losses] == [loss.item() for loss in uniform.losses]
    assert other.statistics.objective == uniform.statistics.objective
    assert other.statistics.weights is None


BAD = 5
"""A row with labels."""


@pytest.mark.parametrize("micro_steps", [1, 4])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("average", ["token", "sequence"])
def test_a_loss_that_is_not_finite_poisons_nothing(group: str, micro_steps: int, bad: float, average: str) -> None:
    logits = logits_of(1)
    logits[BAD, 0, 3:9] = bad
    z_loss = 0.0 if group == "global_batch_one_pass" else 0.1
    previous = range_of(0)
    outcome = take_step(settings(group, average, z_loss), micro_steps, 1, previous, logits)
    assert outcome.gradient[BAD].abs().max() == 0
    assert outcome.gradient.isfinite().all()
    losses, counts = plain_losses(1)
    others = np.arange(GLOBAL_BATCH) != BAD
    statistics = outcome.statistics
    assert statistics.loss == pytest.approx((losses * counts)[others].sum() / counts[others].sum())
    assert [(found.position, found.source, found.rank, found.row) for found in statistics.dropped] == [
        (GLOBAL_BATCH + BAD, 1, 0, BAD)
    ]
    weights = found_weights(statistics)
    assert weights[BAD] == 0
    squares = np.log(np.exp(logits_of(1).double().numpy()).sum(-1)) ** 2
    counted = (squares * batch_of(1, np.arange(GLOBAL_BATCH)).loss_mask.numpy())[others].sum()
    shares = counts if average == "token" else counts > 0
    expected = (weights * shares * losses)[others].sum() / shares.sum() + z_loss * counted / counts.sum()
    assert statistics.objective == pytest.approx(expected)
    groups = np.split(np.arange(GLOBAL_BATCH), micro_steps if group == "micro_step" else 1)
    for members in groups:
        assert (weights * shares)[members].sum() == pytest.approx(shares[members].sum(), rel=1e-6)
    known = statistics.loss_range or previous
    assert math.isfinite(known.highest)


def test_a_step_without_any_finite_loss_has_no_loss() -> None:
    blind = torch.full((GLOBAL_BATCH, LENGTH, VOCABULARY), math.nan)
    for group in GROUPS:
        outcome = take_step(settings(group), 4, 1, None, blind.clone())
        assert math.isnan(outcome.statistics.loss), "so that the run stops"
        assert len(outcome.statistics.dropped) == GLOBAL_BATCH - 1, "one row is a hole"
        assert outcome.gradient.abs().max() == 0


@pytest.mark.parametrize("given", [{"strategy": "uniform"}, *({"group": g, "start_step": 9} for g in GROUPS)])
def test_where_nothing_is_reweighted_nothing_is_dropped(given: dict[str, Any]) -> None:
    logits = logits_of(1)
    logits[BAD, 0, 3:9] = math.nan
    chosen = {"strategy": "linupper", **given}
    outcome = take_step(build_settings(ObjectiveSettings, {"reweighting": chosen}, "test"), 4, logits=logits)
    assert math.isnan(outcome.statistics.loss)
    assert outcome.statistics.dropped == ()


class NoHostRead(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        waits = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2"}
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1] if index is not None
        )
        assert name not in waits, f"{name} waits for the device"
        assert not by_mask, f"{name} by a mask waits for the device"
        return function(*args, **(kwargs or {}))


def on_meta(batch: Batch) -> Batch:
    """On a device whose tensors have no values that could be read."""
    assert batch.loss_mask is not None
    return batch.to("meta")


def weighing(chosen: ObjectiveSettings, batches: Sequence[Batch], device: str) -> None:
    """Everything of a step between its beginning and its end."""
    objective = Objective(chosen, 2, Distributed(0, 1, torch.device(device)))
    objective.begin_step(1, batches, LossRange(1.0, 9.0, 0.5))
    moved = [batch if device == "cpu" else on_meta(batch) for batch in batches]
    logits = torch.randn(len(moved), LENGTH, VOCABULARY, device=device, requires_grad=True)
    with NoHostRead():
        if objective.scores_first:
            with torch.no_grad():
                for batch in moved:
                    objective.score(logits * 1.0, batch)
        for batch in moved:
            objective.micro_step(logits * 1.0, batch).backward()
        objective.gradient_factor()


@pytest.mark.parametrize("group", GROUPS)
def test_nothing_waits_for_the_device_within_a_step(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [batch_of(1, np.arange(start, start + 2)) for start in (0, 2)]
    cap = {} if group == "global_batch_one_pass" else {"cap": 1.5}
    z_loss = 0.0 if group == "global_batch_one_pass" else 0.1
    weighing(settings(group, z_loss=z_loss, **cap), batches, "cpu")
    # what begins a step is read on the host; the sums over the ranks, on one rank, are its own
    monkeypatch.setattr(Distributed, "all_reduce", lambda self, tensor: torch.tensor([50, 4, 0, 0]))
    weighing(settings(group, z_loss=z_loss, **cap), batches, "meta")


def test_the_test_for_waiting_would_see_it() -> None:
    value = torch.ones(3)
    for wait in (lambda: value[0].item(), lambda: value[value > 0], lambda: value.nonzero(), lambda: bool(value.sum())):
        with pytest.raises(AssertionError, match="waits for the device"), NoHostRead():
            wait()


def golden_rows() -> dict[str, list[list[float]]]:
    """Two ranks of losses [2, 3] and [4, 6], in one micro-step and in two."""
    from pretrain.distributed import start
    from pretrain.objective.groups import make_weigher
    from pretrain.objective.reweighting import Samples

    ranks = start(60)
    losses = torch.tensor([[2.0, 3.0], [4.0, 6.0]], dtype=torch.float64)[ranks.rank]

    def samples(values: Tensor) -> Samples:
        return Samples(values, torch.full_like(values, 7.0), *[values * 0] * 3)

    found = {}
    for group, micro_steps in itertools.product(GROUPS, (1, 2)):
        previous = LossRange(2.0, 6.0, 1.5)
        weigher = make_weigher(settings(group).reweighting, 5, micro_steps, ranks, previous)
        assert weigher is not None
        parts = [samples(part) for part in losses.view(micro_steps, -1)]
        if weigher.scores_first:
            for part in parts:
                weigher.score(part)
        own = torch.cat([weigher.weigh(part) for part in parts]).double()
        factor = weigher.gradient_factor()
        own = own if factor is None else own * factor
        assert weigher.result().weights.numel() == 4
        found[f"{group} {micro_steps}"] = (own / 4).tolist()
    return found  # type: ignore[return-value]


def test_two_ranks_weigh_as_one_group() -> None:
    """Golden values of arXiv 2502.06733's LinUpper at r = 0.4; per-rank normalisation would give 0.0379, 0.4621."""
    first, second = run_on_ranks(golden_rows, 2)
    golden = [0.034656, 0.120960, 0.422192, 0.422192]
    for name in first:
        if name != "micro_step 2":
            assert first[name] + second[name] == pytest.approx(golden, abs=5.1e-7), name
    # two groups of two: [2, 4] and [3, 6]
    pairs = torch.softmax(torch.tensor([0, 2.5]), 0).tolist()
    assert first["micro_step 2"] == pytest.approx([pairs[0] / 2] * 2)
    assert second["micro_step 2"] == pytest.approx([pairs[1] / 2] * 2)


def refusal(world_size: int = 1, engine: dict[str, Any] | None = None, z_loss: float = 0.0, **sections: Any) -> str:
    reweighting = sections.pop("reweighting", {})
    chosen = {"strategy": "linupper", "group": "global_batch_one_pass", **reweighting}
    config = tiny_config(
        objective={"reweighting": chosen, "z_loss": z_loss},
        engine=engine or {"zero_stage": 1},
        training={"global_batch": 8, "micro_batch": 2, **sections},
    )
    with pytest.raises(UserError) as caught:
        check_run(config, world_size)
    return str(caught.value)


def test_what_one_pass_can_not_do_is_refused() -> None:
    message = refusal(z_loss=0.1)
    for part in ("global_batch_one_pass", "4 micro-steps", "z_loss = 0.1", "micro_batch to 8", "group=global_batch"):
        assert part in message
    assert "offload_optimizer = 'cpu'" in refusal(engine={"zero_stage": 2, "offload_optimizer": "cpu"})
    # with one micro-step nothing has to be multiplied, and the data is what is missing
    assert "nowhere" in refusal(micro_batch=8, z_loss=0.1)
    assert "nowhere" in refusal(world_size=4, z_loss=0.1)
    assert "2 micro-steps" in refusal(world_size=4, z_loss=0.1, batch_ramp=[{"steps": 1, "global_batch": 16}]), (
        "the largest of the ramp"
    )
    assert "nowhere" in refusal(z_loss=0.1, reweighting={"group": "global_batch"})


def test_groups_of_one_and_ends_never_reached_are_refused() -> None:
    one = {"strategy": "linupper", "group": "global_batch"}
    assert "training.global_batch = 1" in refusal(reweighting=one, global_batch=1, micro_batch=1)
    assert "micro_batch x ranks = 1" in refusal(reweighting={"group": "micro_step"}, micro_batch=1)
    # what is off weighs nothing, whatever the group
    assert "nowhere" in refusal(reweighting={**one, "temperature": math.inf}, global_batch=1, micro_batch=1)
    assert "start_step = 3 is not before the run's end at 3" in refusal(reweighting={"start_step": 3})
    warmup = {"temperature": 9.0, "steps": 2}
    assert "would never be reached" in refusal(reweighting={"warmup": warmup, "start_step": 1})


def test_small_groups_are_warned_of() -> None:
    def told(
        world_size: int, micro_batch: int = 2, global_batch: int = 16, first_batch: int = 0, **given: Any
    ) -> list[str]:
        reweighting = {"strategy": "linupper", "temperature": 0.4, **given}
        ramp = [{"steps": 1, "global_batch": first_batch}] if first_batch else []
        training = {"global_batch": global_batch, "micro_batch": micro_batch, "batch_ramp": ramp}
        return warnings(tiny_config(objective={"reweighting": reweighting}, training=training), world_size)

    (warning,) = told(2)
    share = math.exp(2.5) / (math.exp(2.5) + 3)
    assert f"groups of only 4 samples against each other: one of them can take {share:.0%}" in warning
    assert "25% is uniform" in warning
    assert "set group=global_batch" in warning
    assert told(4) == []
    assert told(2, group="global_batch") == []
    assert "only 4 samples" in told(2, global_batch=4, group="global_batch_one_pass")[0]
    assert "only 4 samples" in told(2, first_batch=4, group="global_batch")[0], "of the first steps"
    assert "can take 50%" in told(2, cap=2.0)[0]
    assert told(1, strategy="uniform", temperature=1.0) == []
    assert told(1, temperature=math.inf) == []
