"""Learning-rate schedules at their corners, in closed form."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from data_pipeline.errors import UserError
from data_pipeline.settings import build_settings
from pretrain.optimizer import ScheduleSettings, check_schedule, learning_rate

PEAK = 2.0
TOTAL = 110


def schedule(name: str, **changes: object) -> ScheduleSettings:
    extra = {"decay_steps": 40} if name == "wsd" else {}
    return ScheduleSettings(**{"name": name, "warmup_steps": 10, **extra, **changes})


def rates(settings: ScheduleSettings, total: int = TOTAL) -> list[float]:
    return [learning_rate(step, total, settings, PEAK) for step in range(total + 1)]


ALL = ["cosine", "linear", "wsd", "constant"]


@pytest.mark.parametrize("name", ALL)
def test_warm_up_rises_linearly_from_one_share_to_the_peak(name: str) -> None:
    assert rates(schedule(name))[:11] == pytest.approx([PEAK * share / 10 for share in (*range(1, 11), 10)])


@pytest.mark.parametrize("name", ALL)
def test_without_warm_up_the_first_step_has_the_peak(name: str) -> None:
    assert learning_rate(0, TOTAL, schedule(name, warmup_steps=0), PEAK) == PEAK


@pytest.mark.parametrize("minimum", [0.0, 0.1, 0.5, 1.0])
def test_closed_forms_after_the_warm_up(minimum: float) -> None:
    # (1 + cos) / 2 at 0, 1/4, 1/3, 1/2, 2/3, 3/4 and 1 of the way: a run of 10 + 120 steps
    cosine = {10: 1, 40: (2 + math.sqrt(2)) / 4, 50: 3 / 4, 70: 1 / 2, 90: 1 / 4, 100: (2 - math.sqrt(2)) / 4, 130: 0}
    linear = {10: 1, 40: 3 / 4, 70: 1 / 2, 100: 1 / 4, 129: 1 / 120, 130: 0}
    wsd = {10: 1, 60: 1, 90: 1, 91: 39 / 40, 100: 3 / 4, 110: 1 / 2, 129: 1 / 40, 130: 0}
    for name, heights in (("cosine", cosine), ("linear", linear), ("wsd", wsd)):
        settings = schedule(name, minimum_ratio=minimum)
        for step, height in heights.items():
            expected = PEAK * (minimum + (1 - minimum) * height)
            assert learning_rate(step, 130, settings, PEAK) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_constant_stays_and_the_default_minimum_is_a_tenth() -> None:
    assert rates(schedule("constant"))[10:] == [PEAK] * (TOTAL - 9)
    for name in ("cosine", "linear", "wsd"):
        assert learning_rate(TOTAL, TOTAL, schedule(name), PEAK) == pytest.approx(PEAK / 10)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("total", [TOTAL, 1000])
def test_continuous_positive_and_falling(name: str, total: int) -> None:
    curve = rates(schedule(name, minimum_ratio=None if name == "constant" else 0.0), total)
    assert all(rate > 0 for rate in curve[:-1])
    falls = [before - now for before, now in pairwise(curve[9:])]
    assert all(fall >= 0 for fall in falls)
    # the steepest fall: cosine's middle pi/2 n, linear's 1/n, wsd's 1/decay_steps
    steepest = (
        PEAK * {"cosine": math.pi / 2 / (total - 10), "linear": 1 / (total - 10), "wsd": 1 / 40, "constant": 0}[name]
    )
    assert max(falls) <= steepest * (1 + 1e-9)


@pytest.mark.parametrize("name", ALL)
def test_after_the_run_the_rate_stays_where_it_ended(name: str) -> None:
    settings = schedule(name)
    assert learning_rate(TOTAL + 500, TOTAL, settings, PEAK) == learning_rate(TOTAL, TOTAL, settings, PEAK)


def test_a_run_of_nothing_but_warm_up() -> None:
    settings = schedule("cosine", warmup_steps=4)
    check_schedule(settings, 4)
    assert rates(settings, 4) == pytest.approx([0.5, 1.0, 1.5, 2.0, 0.2])


def test_a_schedule_longer_than_the_run_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"schedule\.warmup_steps 10 is more than the run's 9 optimizer steps\. Shorten"
    ):
        check_schedule(schedule("linear"), 9)
    with pytest.raises(
        UserError, match=r"warmup_steps 10 plus schedule\.decay_steps 40 is more than the run's 49 opti"
    ):
        check_schedule(schedule("wsd"), 49)
    check_schedule(schedule("linear"), 10)
    check_schedule(schedule("wsd"), 50)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "wsd"}, "name wsd needs decay_steps, the number of optimizer steps"),
        ({"name": "cosine", "decay_steps": 5}, "decay_steps 5 belongs to name wsd; with cosine leave it out"),
        ({"name": "constant", "minimum_ratio": 0.1}, "minimum_ratio 0.1 has no meaning with name constant"),
        ({"name": "cosin"}, "'name' = 'cosin': input should be 'cosine', 'linear', 'wsd' or 'constant'; did you mean"),
        ({"minimum_ratio": 1.5}, "'minimum_ratio' = 1.5: input should be less than or equal to 1"),
        ({"warmup_steps": -1}, "'warmup_steps' = -1: input should be greater than or equal to 0"),
        ({"warmup": 3}, "unknown key 'warmup' (value 3); did you mean 'warmup_steps'?"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        build_settings(ScheduleSettings, settings, "schedule")
    assert message in str(refusal.value)
