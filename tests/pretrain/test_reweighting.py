"""The weights of one group of samples: golden values, invariants, the cap, dropped samples, the schedule of r."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.settings import build_settings
from pretrain.objective import ObjectiveSettings, ReweightingSettings, StrategySettings
from pretrain.objective.reweighting import Samples, log_importances, relative_weights

LOSSES = [2.0, 3.0, 4.0, 6.0]
STRATEGIES = ("linupper", "quadratic", "extremes")
GOLDEN = {
    ("linupper", 0.4): [0.034656, 0.120960, 0.422192, 0.422192],
    ("linupper", 1.0): [0.123681, 0.203916, 0.336201, 0.336201],
    ("linupper", 100.0): [0.248440, 0.249686, 0.250937, 0.250937],
    ("quadratic", 0.4): [0.048301, 0.314965, 0.588432, 0.048301],
    ("quadratic", 1.0): [0.146300, 0.309717, 0.397684, 0.146300],
    ("quadratic", 100.0): [0.248906, 0.250780, 0.251408, 0.248906],
    ("extremes", 0.4): [0.422192, 0.120960, 0.034656, 0.422192],
    ("extremes", 1.0): [0.336201, 0.203916, 0.123681, 0.336201],
    ("extremes", 100.0): [0.250937, 0.249686, 0.248440, 0.250937],
}


def settings(**given: Any) -> ReweightingSettings:
    return build_settings(ReweightingSettings, given, "test")


def samples(losses: Any, counts: Any = 5) -> Samples:
    column = torch.as_tensor(losses, dtype=torch.float64)
    counts = torch.as_tensor(counts, dtype=torch.float64).expand(len(column))
    nothing = torch.zeros_like(column)
    return Samples(column, counts, nothing, torch.arange(len(column), dtype=torch.float64), nothing)


def weights(losses: Any, counts: Any = 5, **given: Any) -> Tensor:
    chosen, group = settings(**given), samples(losses, counts)
    logs = log_importances(group, chosen.strategy, chosen.temperature_at(10**9))
    return relative_weights(logs, group, chosen.cap)


@pytest.mark.parametrize(("strategy", "temperature"), GOLDEN)
def test_golden_values(strategy: str, temperature: float) -> None:
    """arXiv 2502.06733: with equal counts the relative weights are the paper's times the group size."""
    found = weights(LOSSES, strategy=strategy, temperature=temperature)
    assert (found / 4).tolist() == pytest.approx(GOLDEN[strategy, temperature], abs=5.1e-7)


def test_golden_objectives() -> None:
    for strategy, golden in (("linupper", 4.654113), ("quadratic", 3.685034), ("extremes", 3.879039)):
        found = weights(LOSSES, strategy=strategy, temperature=0.4)
        assert float((found / 4).double() @ torch.tensor(LOSSES).double()) == pytest.approx(golden, abs=1.1e-6)


def test_normalising_on_each_rank_would_be_another_thing() -> None:
    """What two ranks holding [2, 3] and [4, 6] would get, were the range each rank's own."""
    split = [weights(part, strategy="linupper", temperature=0.4) / 4 for part in (LOSSES[:2], LOSSES[2:])]
    assert torch.cat(split).tolist() == pytest.approx([0.037929, 0.462071, 0.037929, 0.462071], abs=5.1e-7)
    assert torch.cat(split).tolist() != pytest.approx(GOLDEN["linupper", 0.4], abs=1e-3)


def test_an_outlier_among_eight() -> None:
    for temperature, share in ((0.4, 0.635), (1.0, 0.280)):
        found = weights([1.0] * 7 + [9.0], strategy="linupper", temperature=temperature)
        assert found[-1].item() / 8 == pytest.approx(share, abs=5e-4)


def test_evenly_spread_losses() -> None:
    found = weights(np.linspace(1, 3, 4001), strategy="linupper", temperature=0.4).double()
    assert found.max().item() == pytest.approx(1.463, abs=1e-3)
    assert (found.sum().square() / found.square().sum()).item() / 4001 == pytest.approx(0.78, abs=5e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_infinite_temperature_is_exactly_uniform(strategy: str) -> None:
    """Law 9, bitwise."""
    off = settings(strategy=strategy, temperature=math.inf)
    group = samples(LOSSES, [3, 1, 9, 2])
    assert relative_weights(log_importances(group, off.strategy, math.inf), group).tolist() == [1.0] * 4
    assert off.off


def test_samples_without_labels_stay_out_of_the_loss_range() -> None:
    with_hole = weights([0.0, *LOSSES], [0, 5, 5, 5, 5], strategy="linupper", temperature=0.4)
    assert with_hole[0] == 0
    assert with_hole[1:].tolist() == weights(LOSSES, strategy="linupper", temperature=0.4).tolist()


@pytest.mark.parametrize("cap", [None, 2.0])
def test_a_group_without_any_label_weighs_nothing(cap: float | None) -> None:
    assert weights([0.0] * 3, [0] * 3, strategy="linupper", cap=cap).tolist() == [0.0] * 3


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_left_out_and_the_group_keeps_its_share(bad: float, cap: float | None) -> None:
    found = weights([2.0, bad, 3.0, 4.0, 6.0], [5, 10, 5, 5, 5], strategy="linupper", temperature=0.4, cap=cap)
    others = weights(LOSSES, strategy="linupper", temperature=0.4)
    assert found[1] == 0
    assert (found.double() @ torch.tensor([5, 10, 5, 5, 5.0]).double()).item() == pytest.approx(30)
    if cap is None:
        assert found[[0, 2, 3, 4]].tolist() == pytest.approx((others * 1.5).tolist())
    assert weights([bad] * 3, strategy="linupper", cap=cap).tolist() == [0.0] * 3


finite_losses = st.lists(st.floats(0.0, 20.0, width=32), min_size=2, max_size=16)


@examples(deadline=None)
@given(finite_losses, st.sampled_from(STRATEGIES), st.floats(0.1, 10.0), st.floats(0.5, 3.0), st.floats(0.0, 5.0))
def test_invariants(values: list[float], strategy: str, temperature: float, scale: float, shift: float) -> None:
    """The weighted count is the plain count; weights are positive, equivariant and blind to scale and shift."""
    chosen = {"strategy": strategy, "temperature": temperature}
    losses = torch.tensor(values, dtype=torch.float64)
    counts = torch.arange(1, len(values) + 1)
    found = weights(losses, counts, **chosen)
    assert (found.double() * counts).sum().item() == pytest.approx(counts.sum().item(), rel=1e-5)
    assert (found > 0).all()
    order = torch.randperm(len(values))
    assert weights(losses[order], counts[order], **chosen).tolist() == pytest.approx(found[order].tolist())
    assert (found.max() / found.min()).item() <= math.exp(1 / temperature) * (1 + 1e-6)
    if losses.max() - losses.min() > 1e-2:
        moved = weights(losses * scale + shift, counts, **chosen)
        assert moved.tolist() == pytest.approx(found.tolist(), rel=1e-4)
        middle = (losses.max() + losses.min()) / 2
        above = found[losses >= middle]
        if strategy == "linupper":
            assert set(above.tolist()) == {found.max().item()}
            if 2 * len(above) >= len(values):
                equal = weights(losses, **chosen)
                assert equal.max().item() <= 2 * (1 + 1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equal_losses_weigh_equally(strategy: str) -> None:
    assert weights([3.7] * 5, 4, strategy=strategy, temperature=0.1).tolist() == [1.0] * 5


def test_losses_that_nearly_agree_are_not_blown_up() -> None:
    """The range counts as 1e-6 at least: h = [-0.1, 0.1] for losses that differ by 1e-7."""
    found = weights([3.0, 3.0 + 1e-7], strategy="linupper", temperature=1.0).double()
    assert (found[1] / found[0]).item() == pytest.approx(math.exp(0.1), rel=1e-6)


def test_a_hole_is_not_dropped() -> None:
    group = samples([math.nan, math.nan, 2.0], [0, 5, 5])
    assert (group.dropped.tolist(), group.valid.tolist()) == ([False, True, False], [False, False, True])


def test_a_temperature_near_zero_leaves_those_of_the_highest_score() -> None:
    assert weights(LOSSES, strategy="linupper", temperature=1e-3).tolist() == [0, 0, 2, 2]
    assert weights([2.0, 6.0], strategy="quadratic", temperature=1e-3).tolist() == [1, 1]


def poured(importances: np.ndarray, counts: np.ndarray, cap: float) -> np.ndarray:
    """min(cap, t e) with the t that fills the group's count, by bisection."""
    low, high = 0.0, 1e12
    for _ in range(300):
        level = (low + high) / 2
        full = (np.minimum(cap, level * importances) * counts).sum() >= counts.sum()
        low, high = (low, level) if full else (level, high)
    return np.minimum(cap, high * importances)


@examples(deadline=None)
@given(finite_losses, st.floats(0.15, 5.0), st.floats(1.0, 6.0), st.integers(0, 2**32 - 1))
def test_a_cap_is_kept_and_the_rest_fills_up(values: list[float], temperature: float, cap: float, seed: int) -> None:
    counts = np.random.default_rng(seed).integers(1, 30, len(values)).astype(float)
    losses = np.array(values)
    found = weights(losses, counts, strategy="linupper", temperature=temperature, cap=cap).double().numpy()
    h = (2 * losses - losses.max() - losses.min()) / max(losses.max() - losses.min(), 1e-6)
    importances = np.exp(np.minimum(h + 1, 1) / temperature)
    assert found == pytest.approx(poured(importances, counts, cap), rel=2e-6)
    assert found.max() <= cap * (1 + 1e-6)
    assert (found * counts).sum() == pytest.approx(counts.sum(), rel=1e-6)


def test_caps_at_their_limits() -> None:
    chosen = {"strategy": "linupper", "temperature": 0.4}
    assert weights(LOSSES, cap=1.0, **chosen).tolist() == [1.0] * 4
    assert weights(LOSSES, cap=50.0, **chosen).tolist() == pytest.approx(weights(LOSSES, **chosen).tolist())
    # importances that a double can't hold beside each other: exp(-10000)
    found = weights([1.0, 1.1, 1.2, 9.0], strategy="linupper", temperature=1e-4, cap=2.0)
    assert found.tolist() == pytest.approx([0.0, 0.0, 2.0, 2.0])


def test_the_temperature_is_a_function_of_the_step() -> None:
    def rates(change: str, steps: list[int]) -> list[float]:
        warmup = {"temperature": 100.0, "steps": 4, "change": change}
        chosen = settings(strategy="linupper", temperature=0.5, start_step=10, warmup=warmup)
        return [chosen.temperature_at(step) for step in steps]

    steps = [9, 10, 11, 12, 13, 14, 99]
    assert rates("constant", steps) == [math.inf, 100, 100, 100, 100, 0.5, 0.5]
    assert rates("linear", steps) == [math.inf, 100, 75.125, 50.25, 25.375, 0.5, 0.5]
    halves = [0.5 + 99.5 * (1 + math.cos(math.pi * done)) / 2 for done in (0, 0.25, 0.5, 0.75)]
    assert rates("cosine", steps) == pytest.approx([math.inf, *halves, 0.5, 0.5])
    assert settings().temperature_at(5) == math.inf
    assert settings(strategy="linupper", temperature=0.5).temperature_at(0) == 0.5


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"strategy": "linuper"}, ["unknown kind 'linuper' of 'strategy'", "did you mean 'linupper'?"]),
        ({"strategy": {"kind": "linupper", "slope": 2}}, ["unknown key 'strategy.slope'"]),
        ({"strategy": "linupper", "temperature": 0.0}, ["'temperature' = 0.0", "greater than 0"]),
        ({"cap": 2.0}, ["cap has no meaning with strategy uniform"]),
        ({"strategy": "uniform", "group": "global_batch"}, ["group has no meaning with strategy uniform"]),
        ({"strategy": "linupper", "cap": 0.9}, ["'cap' = 0.9", "greater than or equal to 1"]),
        ({"strategy": "linupper", "group": "global"}, ["'group' = 'global'", "did you mean 'global_batch'?"]),
        (
            {"strategy": "linupper", "group": "global_batch_one_pass", "cap": 2.0},
            ["cap 2.0 needs the weights' normaliser before the backward pass", "set group=global_batch or micro_step"],
        ),
        (
            {"strategy": "linupper", "warmup": {"temperature": math.inf, "steps": 5, "change": "linear"}},
            ["warmup: there is no linear way from an infinite temperature"],
        ),
        (
            {
                "strategy": "linupper",
                "temperature": math.inf,
                "warmup": {"temperature": 1.0, "steps": 5, "change": "cosine"},
            },
            ["there is no cosine way to an infinite temperature"],
        ),
        ({"strategy": "linupper", "warmup": {"temperature": 2.0}}, ["'warmup.steps' is missing"]),
        ({"strategy": "linupper", "warmup": {"temperature": -1.0, "steps": 5}}, ["'warmup.temperature' = -1.0"]),
    ],
)
def test_refusals(given: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        settings(**given)
    for part in parts:
        assert part in str(caught.value)


class Confident(StrategySettings):
    """A strategy of the other kind: importances 1 - p, p = exp(-loss)."""

    kind: Literal["confident"] = "confident"
    has_temperature: ClassVar[bool] = False

    def log_importances(self, losses: Tensor, lowest: Tensor, highest: Tensor, temperature: float) -> Tensor:
        return (-losses).exp().neg().log1p()


def test_a_strategy_may_give_the_importances_themselves() -> None:
    group = samples([math.log(2), math.log(4), math.nan], [10, 20, 10])
    found = relative_weights(log_importances(group, Confident(), 1.0), group)
    scale = 40 / (10 * 0.5 + 20 * 0.75)
    assert found.tolist() == pytest.approx([0.5 * scale, 0.75 * scale, 0.0])
    chosen = ReweightingSettings.model_construct({"strategy"}, strategy=Confident(), start_step=3)
    assert (chosen.temperature_at(2), chosen.temperature_at(3), chosen.off) == (math.inf, 1.0, False)
    with pytest.raises(ValueError, match="temperature has no meaning with strategy confident"):
        ReweightingSettings.model_construct({"temperature"}, strategy=Confident(), temperature=0.4)._check()


def test_the_block_of_the_documentation_builds() -> None:
    text = (Path(__file__).parents[2] / "docs/methods.md").read_text()
    section = text.split("## Sample reweighting")[1].split("\n## ")[0]
    (block,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    build_settings(ObjectiveSettings, yaml.safe_load(block)["objective"], "docs/methods.md")
