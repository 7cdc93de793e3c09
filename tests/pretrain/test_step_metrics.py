"""The metric fields that come from the objective, against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.distributed import Distributed
from pretrain.monitor import WEIGHT_BINS
from pretrain.objective import Objective, ObjectiveSettings, StepStatistics
from pretrain.step_metrics import step_metrics

from .steps import GLOBAL_BATCH, LENGTH, VOCABULARY, batch_of


def statistics(*groups: list[float]) -> StepStatistics:
    return StepStatistics(
        objective=1.5,
        source_losses=(12.0, 6.0, 0.0),
        source_labels=(4, 5, 0),
        holes=0,
        weights=tuple(torch.tensor(group) for group in groups),
        flags=(),
    )


def test_losses_are_means_over_labels() -> None:
    fields = step_metrics(statistics(), ["a", "b", "c"])
    # no label of c in this step: no loss of it, rather than a 0; nothing was reweighted: no weights
    assert fields == {"loss": 2.0, "objective": 1.5, "domain_loss/a": 3.0, "domain_loss/b": 1.2}


def test_weights_of_two_groups() -> None:
    """(Σu)² / Σu² / M: [1, 1, 1, 1] gives 1, [4, 0, 0, 0] gives 1/4; their mean, not that of all eight (0.4)."""
    fields = step_metrics(statistics([1.0] * 4, [4.0, 0.0, 0.0, 0.0]), "abc")
    assert fields["weights/ess"] == pytest.approx(0.625)
    assert fields["weights/min"] == 0.0
    assert fields["weights/max"] == 4.0
    histogram = fields["weights/histogram"]
    assert isinstance(histogram, list)
    assert len(histogram) == len(WEIGHT_BINS) + 1
    places = {place: count for place, count in enumerate(histogram) if count}
    one, four = (int(np.searchsorted(WEIGHT_BINS, value)) for value in (1.0, 4.0))
    assert places == {0: 3, one: 4, four: 1}
    assert four - one == 8  # quarter octaves


def test_effective_sample_size_of_a_half_weighted_pair() -> None:
    """u = [1.5, 0.5]: 2² / 2.5 / 2."""
    assert step_metrics(statistics([1.5, 0.5]), "abc")["weights/ess"] == pytest.approx(0.8)


def a_step(settings: ObjectiveSettings) -> StepStatistics:
    alone = Distributed(0, 1, torch.device("cpu"))
    objective = Objective(settings, 2, alone)
    batches = [batch_of(1, np.arange(start, start + 4)) for start in range(0, GLOBAL_BATCH, 4)]
    objective.begin_step(0, batches)
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        objective.micro_step(torch.randn(4, LENGTH, VOCABULARY), batch)
    return objective.end_step()


def test_the_uniform_objective_is_the_loss() -> None:
    """Ragged sequences, a hole: the token average is what is logged as loss."""
    seen = a_step(ObjectiveSettings())
    fields = step_metrics(seen, ["a", "b"])
    assert seen.holes == 1
    assert fields["objective"] == pytest.approx(fields["loss"], rel=1e-6)
    assert "weights/ess" not in fields
    other = step_metrics(a_step(ObjectiveSettings(average="sequence")), ["a", "b"])
    assert other["loss"] == fields["loss"]
    assert other["objective"] != pytest.approx(other["loss"], rel=1e-4)


def test_the_logged_loss_is_blind_to_weights() -> None:
    settings = ObjectiveSettings.model_validate({"reweighting": {"strategy": "linupper", "temperature": 0.4}})
    seen = a_step(settings)
    assert len(seen.weights) == 2
    assert [len(group) for group in seen.weights] == [4, 4]
    assert seen.loss == a_step(ObjectiveSettings()).loss
    assert seen.objective > seen.loss  # samples of low loss weigh less


def test_source_losses_add_up_to_numpys() -> None:
    seen = a_step(ObjectiveSettings())
    sums, counts = np.zeros(2), np.zeros(2, int)
    for number, start in enumerate(range(0, GLOBAL_BATCH, 4)):
        batch = batch_of(1, np.arange(start, start + 4))
        torch.manual_seed(number)
        logits = torch.randn(4, LENGTH, VOCABULARY).double().numpy()
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for row, place in zip(*np.nonzero(batch.loss_mask.numpy()), strict=True):
            source = int(batch.source_ids[row])
            sums[source] -= log_p[row, place, batch.labels[row, place]]
            counts[source] += 1
    assert seen.source_labels == tuple(counts)
    assert seen.source_losses == pytest.approx(tuple(sums), rel=1e-6)
