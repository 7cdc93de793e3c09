"""A run in muP: what it saved is evaluated and gone on from as it is, and only by the same scaling."""

from __future__ import annotations

import pytest

from pretrain.evaluate_run import evaluate_run

from .runs import Runs

BASE = {"hidden_size": 16, "heads": 2, "intermediate_size": 24}


@pytest.mark.slow
def test_a_checkpoint_fits_to_its_own_scaling_alone(runs: Runs) -> None:
    mup = {"base": BASE, "embedding_multiplier": 2.0, "output_multiplier": 4.0, "zero_init_query": True}
    model = {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate_size": 48, "mup": mup}
    config = runs.config("run", model=model, training={"steps": 4}, evaluation={"every_steps": 4})
    done = runs.train(config)
    assert done.returncode == 0, done.stderr
    (logged,) = (line for line in runs.metrics("run") if "evaluation" in line)
    again = evaluate_run(runs.run_folder("run"), None, None)
    assert again["loss"] == pytest.approx(logged["loss"], rel=1e-6)
    for other in ("model.mup.base.hidden_size=32", "model.mup=null"):
        refused = runs.train(config, other, "training.steps=8")
        assert refused.returncode != 0
        assert "the model or its optimizer differs (mup: " in refused.stderr, refused.stderr
    assert [line["step"] for line in runs.metrics("run") if "objective" in line] == [1, 2, 3, 4]
    more = runs.train(config, "training.steps=8", "optimizer.weight_decay=0.0")
    assert more.returncode == 0, more.stderr
    assert [line["step"] for line in runs.metrics("run") if "objective" in line] == list(range(1, 9))
