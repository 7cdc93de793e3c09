"""A run with experts under the real launcher: its metrics, and a resume after a kill that is no other run."""

from __future__ import annotations

import pytest

from pretrain.evaluate_run import evaluate_run

from .runs import Runs

MIXTURE = {"number": 4, "top_k": 2, "intermediate_size": 12, "dense_first": 1, "selection_bias": True, "jitter": 0.05}
BALANCING = {
    "losses": [
        {"kind": "load_balance", "coefficient": 0.01},
        {"kind": "load_balance", "coefficient": 0.01, "frequencies": "running"},
        {"kind": "router_z", "coefficient": 0.001},
    ],
    "bias": {"rate": 0.01},
}


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_bit_and_shows_its_experts(runs: Runs) -> None:
    shape = {"hidden_size": 32, "layers": 3, "heads": 4, "kv_heads": 2, "intermediate_size": 48, "experts": MIXTURE}
    sections = {
        "model": shape,
        "objective": {"balancing": BALANCING},
        "training": {"steps": 8, "precision": "bf16"},
        "engine": {"zero_stage": 2},
        "evaluation": {"every_steps": 4},
    }
    whole = runs.train(runs.config("whole", **sections))
    assert whole.returncode == 0, whole.stderr
    killed = runs.config("killed", **sections)
    assert runs.train(killed, fault="step:6").returncode != 0
    done = runs.train(killed)
    assert done.returncode == 0, done.stderr
    assert runs.state_hashes("killed", 8) == runs.state_hashes("whole", 8)
    lines = [line for line in runs.metrics("whole") if "objective" in line]
    assert [line for line in runs.metrics("killed") if "objective" in line] == lines
    for line in lines:
        assert {
            "experts/imbalance",
            "experts/load_cv",
            "experts/dead",
            "experts/entropy",
            "experts/dropped",
        } <= line.keys()
        assert {
            "experts/loss/global_batch",
            "experts/loss/global_batch_running",
            "experts/loss/router_z",
        } <= line.keys()
        assert "experts/load/0" not in line
        for layer in (1, 2):
            assert sum(line[f"experts/load/{layer}"]) == pytest.approx(1.0, abs=1e-5)
            assert sum(line[f"experts/domain_load/{layer}/b"]) == pytest.approx(1.0, abs=1e-5)
        assert 1.0 <= line["experts/imbalance"] <= 2.0
        assert 0.0 <= line["experts/specialization"] <= 1.0
        assert line["experts/bias_range"] > 0
    logged = [line for line in runs.metrics("whole") if "evaluation" in line][-1]
    assert evaluate_run(runs.run_folder("whole"), None, None)["loss"] == pytest.approx(logged["loss"], rel=1e-2)
