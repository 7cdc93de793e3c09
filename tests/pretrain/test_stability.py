"""Which steps are left out: the z-score in closed form, the bounds, what the state remembers of it."""

from __future__ import annotations

import math
import os
import statistics
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import UserError
from pretrain.config import load_config
from pretrain.deterministic import be_deterministic
from pretrain.objective import StepStatistics
from pretrain.stability import (
    Computed,
    Figures,
    Incident,
    Past,
    SpikeSettings,
    StabilitySettings,
    judge,
    verdict,
    without_checkpoint,
)
from pretrain.stability.robust import robust_z
from pretrain.stability.rollbacks import Rollback, ahead, merged, read_rollbacks, record_rollback
from pretrain.stability.suspects import Suspect, name_samples, suspicious
from pretrain.state import TrainState

FINE = Figures(2.0, 2.1, 0.5)
DEMO = Path(__file__).parents[2] / "configs/demo.yaml"


def past(step: int = 100, losses: tuple[float, ...] = (), skips: tuple[int, ...] = (), rollbacks: int = 0) -> Past:
    return Past(step, losses, skips, rollbacks)


def test_the_z_score_is_that_of_a_worked_example() -> None:
    # median 5, distances 4 3 1 0 1 2 95 sorted 0 1 1 2 3 4 95: MAD 2
    others = [1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 100.0]
    assert robust_z(9.0, others) == pytest.approx(0.6745 * 4 / 2, rel=1e-15)
    assert robust_z(3.0, others) == pytest.approx(-0.6745 * 2 / 2, rel=1e-15)
    # an even number: median 2.5, distances 1.5 0.5 0.5 1.5: MAD 1
    assert robust_z(4.5, [1.0, 2.0, 3.0, 4.0]) == pytest.approx(0.6745 * 2, rel=1e-15)
    # of a normal distribution it is the number of standard deviations, whatever a few outliers are
    normal = statistics.NormalDist(3.0, 0.2)
    quantiles = [normal.inv_cdf((k + 0.5) / 1001) for k in range(1001)]
    assert robust_z(4.0, [*quantiles, 1e9, 1e9, -1e9, -1e9]) == pytest.approx(5.0, rel=5e-3)


def test_without_a_scale_there_is_no_score() -> None:
    assert robust_z(9.0, [2.0, 2.0, 2.0, 7.0]) == 0.0


def test_a_spike_is_a_loss_above_the_threshold_and_never_below() -> None:
    losses = tuple(2.0 + 0.01 * (k % 5 - 2) for k in range(20))  # median 2, MAD 0.01
    settings = StabilitySettings(spike=SpikeSettings(threshold=6.0, window=20, least=20))
    limit = 2.0 + 6.0 * 0.01 / 0.6745
    for loss, spiked in ((limit - 1e-6, False), (limit + 1e-6, True), (0.1, False)):
        found = judge(settings, past(losses=losses), Figures(loss, loss, 1.0))
        assert (found is not None) == spiked
    assert found is None
    found = judge(settings, past(losses=losses), Figures(limit + 1.0, 1.0, 1.0))
    assert found is not None
    assert (found.kind, found.action) == ("spike", "skip")
    assert found.z == pytest.approx(6.0 + 0.6745 * 1.0 / 0.01)
    assert judge(settings, past(losses=losses[1:]), Figures(9.0, 9.0, 1.0)) is None, "too few losses"
    # of more losses than the window only the last count: among all of these, 3 would be no spike
    higher = (*(loss + 7.0 for loss in losses), *losses)
    assert judge(settings, past(losses=higher), Figures(3.0, 3.0, 1.0)) is not None
    off = StabilitySettings()
    assert judge(off, past(losses=losses), Figures(1e9, 1e9, 1e9)) is None, "off by default"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite_is_left_out(bad: float, where: int) -> None:
    figures = Figures(*(bad if place == where else 1.0 for place in range(3)))
    for action in ("skip", "rollback", "stop"):
        settings = StabilitySettings(non_finite=action)  # type: ignore[arg-type]
        found = judge(settings, past(), figures)
        assert found is not None
        assert (found.kind, found.action, found.bound) == ("non_finite", action, "")
    assert judge(StabilitySettings(), past(), FINE) is None


def test_skips_are_bounded_in_a_row_and_in_a_window() -> None:
    settings = StabilitySettings(max_skips_in_row=2, max_skips=4, skip_window=10)
    nan = Figures(math.nan, 1.0, 1.0)

    def action(*skips: int) -> tuple[str, str]:
        found = judge(settings, past(100, skips=skips), nan)
        assert found is not None
        return found.action, found.bound

    assert action(99) == ("skip", "")
    assert action(97, 98) == ("skip", ""), "not in a row with step 100"
    assert action(98, 99)[0] == "stop"
    assert "2 steps before it had no update, and stability.max_skips_in_row = 2" in action(98, 99)[1]
    # the window of ten steps that ends with step 100 begins with 91
    assert action(90, 92, 94, 96) == ("skip", "")
    assert action(91, 92, 94, 96)[0] == "stop"
    assert "4 of the 10 steps up to it had no update, and stability.max_skips = 4" in action(91, 92, 94, 96)[1]


def test_rollbacks_are_bounded_and_fall_back_to_skips() -> None:
    settings = StabilitySettings(non_finite="rollback", max_rollbacks=2, max_skips_in_row=1)
    nan = Figures(1.0, 1.0, math.nan)
    found = judge(settings, past(rollbacks=1), nan)
    assert found is not None
    assert found.action == "rollback"
    assert without_checkpoint(settings, past(), found).action == "skip"
    assert without_checkpoint(settings, past(skips=(99,)), found).action == "stop"
    last = judge(settings, past(rollbacks=2), nan)
    assert last is not None
    assert last.action == "stop"
    assert "2 rollbacks were made, and stability.max_rollbacks = 2" in last.bound


def test_the_state_counts_and_remembers() -> None:
    seen = StepStatistics(2.5, (5.0,), (2,), holes=1)
    frequencies = {"global_batch_running": [[0.75, 0.25]]}
    state = TrainState(4, 40, holes=2, expert_frequencies=frequencies, losses=(1.0, 2.0), skips=(1, 3))
    after = state.advance(50, seen, remembered=2)
    assert (after.step, after.position, after.holes) == (5, 50, 3)
    assert (after.losses, after.skips, after.skipped) == ((2.0, 2.5), (1, 3), 0)
    assert state.advance(50, seen, remembered=0).losses == (), "off keeps nothing"
    left = state.skip(50, holes=1, window=3)
    assert (left.step, left.position, left.holes) == (5, 50, 3)
    assert (left.losses, left.skips, left.skipped) == ((1.0, 2.0), (3, 5), 1)
    assert left.expert_frequencies == frequencies


def test_samples_are_named_with_their_documents_and_the_command(tmp_path: Path) -> None:
    samples = [Suspect(0, 1, 7, 0, 2.0), Suspect(1, 0, 3, 1, math.nan), Suspect(0, 0, 2, 0, 9.0)]
    assert [sample.position for sample in suspicious(samples, "non_finite")] == [3]
    assert [sample.position for sample in suspicious(samples, "spike")][:2] != [3, 7]
    finite = [samples[0], samples[2]]
    assert [sample.position for sample in suspicious(finite, "spike")] == [2, 7]
    told = name_samples(finite, ["a", "b"], {7: ["x", "y", "z", "w", "v"]}, tmp_path, 5)
    explain = f"(`pretrain-data explain {tmp_path} --step 5 --rank 0 --row"
    assert told == (
        f"position 7 of source 'a', loss 2, documents x, y, z and 2 more {explain} 1`); position 2 of source 'a', "
        f"loss 9 {explain} 0`)"
    )
    assert "explain" not in name_samples(finite, ["a", "b"], {}, None, 5)
    assert name_samples(samples * 4, ["a", "b"], {}, None, 5).endswith(" and 4 more")


def rollback(**fields: int) -> Rollback:
    given = {"step": 9, "resumed_step": 4, "start": 32, "stop": 72, **fields}
    return Rollback(kind="spike", message="loss 9", **given)


def test_rollbacks_are_on_the_disk_and_count_for_what_is_ahead(tmp_path: Path) -> None:
    assert read_rollbacks(tmp_path) == ()
    first, second = rollback(), rollback(step=11, start=72, stop=88)
    record_rollback(tmp_path, first)
    record_rollback(tmp_path, second)
    assert read_rollbacks(tmp_path) == (first, second)
    assert ahead((first, second), 32) == (first, second)
    assert ahead((first, second), 33) == (rollback(start=33), second), "the rest of a range is left out too"
    assert ahead((first, second), 72) == (second,)
    (tmp_path / "rollbacks.json").write_text("{")
    with pytest.raises(UserError, match=r"is damaged.*Restore it from a copy, or delete it"):
        read_rollbacks(tmp_path)


def test_ranges_are_merged() -> None:
    assert merged([]) == ()
    assert merged([(5, 9), (1, 3)]) == ((1, 3), (5, 9))
    assert merged([(1, 5), (5, 9), (2, 3)]) == ((1, 9),)
    assert merged([(1, 9), (2, 4), (12, 13)]) == ((1, 9), (12, 13))


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("stability={non_finite: stop, max_skips: 5}", "max_skips 5 says nothing where nothing leaves a step out"),
        ("stability={max_rollbacks: 5}", "max_rollbacks 5 says nothing where nothing goes back"),
        ("stability={drop_steps: 5}", "drop_steps 5 says nothing"),
        ("stability={spike: {least: 40, window: 20}}", "least 40 losses never come together in a window of 20"),
        ("stability={spike: {action: stop}}", "stability.spike.action"),
        ("stability={rerun: true}", "rerun can tell nothing from kernels that add in any order"),
        (["stability.deterministic=true", "training.compile=true"], "can't be kept with training.compile"),
    ],
)
def test_settings_that_say_nothing_or_contradict_are_refused(override: str | list[str], part: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(DEMO, override if isinstance(override, list) else [override])
    assert part in str(caught.value)


def test_an_incident_is_told_with_its_figures() -> None:
    incident = Incident("spike", "skip", Figures(9.0, 9.5, 1.0), 12.345)
    assert incident.told == "loss 9.0, objective 9.5, gradient norm 1.0, robust z-score of the loss 12.35"


def test_what_computing_a_step_again_tells() -> None:
    nan = Figures(math.nan, math.nan, math.inf)
    first = Computed(nan, (1.0, math.nan))
    assert first.same(Computed(Figures(math.nan, math.nan, math.inf), (2.0,)))
    assert first.same_own(Computed(FINE, (1.0, math.nan)))
    assert verdict(first, first, []).endswith("the data or the arithmetic, not the hardware")
    again = Computed(FINE, (1.0, 2.0))
    assert not first.same_own(again)
    told = verdict(first, again, ["rank 1 on n7"])
    assert told == "Computed again it came to loss 2.0, gradient norm 0.5: hardware, on rank 1 on n7"
    assert "a rank that is not known" in verdict(first, again, [])
    assert "rank 3 on n2" in verdict(first, first, ["rank 3 on n2"]), "ranks' errors may cancel in the sum"


def test_deterministic_mode_tells_torch_and_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        be_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == (False, True)
        assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NCCL_ALGO"]) == (":4096:8", "^NVLS")
        # one of the operations without a deterministic kernel, on any device
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
        with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG = ':0:0'"):
            be_deterministic()
    finally:
        torch.use_deterministic_algorithms(False)
