"""The metric fields that come from the objective, against closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.distributed import Distributed
from pretrain.monitor import WEIGHT_BINS
from pretrain.objective import Dropped, Objective, ObjectiveSettings, StepStatistics, StepWeights
from pretrain.objective.reweighting import Samples
from pretrain.step_metrics import NAMED, name_dropped, step_metrics

from .steps import GLOBAL_BATCH, LENGTH, VOCABULARY, batch_of


def statistics(*groups: list[float], **columns: list[float]) -> StepStatistics:
    """With these relative weights; of samples of loss 1, of 10 labels and of source 0, where not told otherwise."""
    plain = torch.ones(len(groups), len(groups[0]) if groups else 0)
    defaults = {"losses": plain, "counts": 10 * plain}
    defaults |= dict.fromkeys(("sources", "positions", "log_importances"), 0 * plain)
    given = {name: torch.tensor([values]).view(plain.shape) for name, values in columns.items()}
    samples = Samples(**{name: column.double() for name, column in {**defaults, **given}.items()})
    return StepStatistics(
        objective=1.5,
        source_losses=(12.0, 6.0, 0.0),
        source_labels=(4, 5, 0),
        holes=0,
        weights=StepWeights(torch.tensor(groups), samples) if groups else None,
        temperature=0.4,
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


def test_shares_of_weight_and_of_labels() -> None:
    """u c = [10, 60, 0, 30] over the sources 0, 1, 1, 0; the hole of source 1 counts for neither."""
    seen = statistics([0.5, 2.0, 0.0, 1.0], counts=[20, 30, 0, 30], sources=[0, 1, 1, 0], losses=[2.0, 7.0, 9.0, 4.5])
    fields = step_metrics(seen, "abc")
    assert fields["weights/share/a"] == pytest.approx(0.4)
    assert fields["weights/share/b"] == pytest.approx(0.6)
    assert fields["weights/uniform_share/a"] == pytest.approx(0.625)
    assert fields["weights/uniform_share/b"] == pytest.approx(0.375)
    assert "weights/share/c" not in fields, "no sample of it in this step"
    assert (fields["weights/loss_min"], fields["weights/loss_max"]) == (2.0, 7.0)
    assert fields["weights/temperature"] == 0.4


def test_dropped_samples_are_named_with_the_command_that_shows_them(tmp_path: Path) -> None:
    dropped = [Dropped(rank=1, row=row, position=100 + row, source=row % 2) for row in range(NAMED + 2)]
    told = name_dropped(dropped, ["a", "b"], tmp_path / "my run", 12)
    assert told.startswith("10 samples without a finite loss: position 100 of source 'a'")
    command = f"`pretrain-data explain '{tmp_path / 'my run'}' --step 12 --rank 1 --row 1`"
    assert f"position 101 of source 'b' ({command})" in told
    assert told.count("pretrain-data explain") == NAMED
    assert told.endswith(" and 2 more")
    assert name_dropped([], ["a"], tmp_path, 12) == ""


def a_step(settings: ObjectiveSettings) -> StepStatistics:
    alone = Distributed(0, 1, torch.device("cpu"))
    objective = Objective(settings, 2, alone)
    batches = [batch_of(1, np.arange(start, start + 4)) for start in range(0, GLOBAL_BATCH, 4)]
    objective.begin_step(0, batches)
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        objective.micro_step(torch.randn(4, LENGTH, VOCABULARY), batch)
    assert objective.gradient_factor() is None
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
    assert seen.weights is not None
    assert seen.weights.weights.shape == (2, 4)
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
