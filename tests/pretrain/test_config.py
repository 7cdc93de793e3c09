"""The configuration: typed, closed, extended, overridden; errors name key, value and the nearest valid key."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from data_pipeline.settings import Settings
from pretrain.config import Config, load_config
from pretrain.objective import ReweightingSettings

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs/demo.yaml"


def refusal(*overrides: str, path: Path = DEMO) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optimizer.learning_rate=1e-3", ["unknown key 'optimizer.learning_rate' (value 0.001)"]),
        ("optimiser.lr=1e-3", ["unknown key 'optimiser'", "did you mean 'optimizer'?"]),
        ("training.step=5", ["unknown key 'training.step' (value 5)", "did you mean 'steps'?"]),
        ("data.sources.code.wieght=1", ["'data.sources.code.wieght'", "did you mean 'weight'?"]),
        ("training.steps=many", ["'training.steps' = 'many'", "valid integer"]),
        ("training.steps=1.5", ["'training.steps' = 1.5", "valid integer"]),
        ("optimizer.lr='1e-3'", ["'optimizer.lr' = '1e-3'", "valid number"]),
        ("optimizer.lr=-1", ["'optimizer.lr' = -1", "greater than 0"]),
        ("engine.zero_stage=4", ["'engine.zero_stage' = 4", "0, 1, 2 or 3"]),
        ("training.precision=bf61", ["'training.precision' = 'bf61'", "did you mean 'bf16'?"]),
        ("objective.reweighting.strategy=linuper", ["did you mean 'linupper'?"]),
        ("objective.reweighting.temperature=0", ["objective.reweighting.temperature", "greater than 0"]),
        ("training.micro_batch=5", ["global_batch 16 is not a multiple of micro_batch 5", "15 and 20"]),
        ("training.tokens=5", ["exactly one of training.steps and training.tokens"]),
        ("model.heads=5", ["hidden_size 192 is not a multiple of heads 5"]),
        ("data.phases=[{start: 5, weights: {code: 1}}]", ["the phase at 5", "['code', 'docs']"]),
        ("run.name=a/b", ["'run.name' = 'a/b'"]),
        ("data.phases=[{start: 5, weights: {code: 1, docs: -1}}]", ["greater than or equal to 0"]),
        ("objective.reweighting.strategy=uniform", ["start_step", "has no meaning with strategy uniform"]),
        (
            "data.max_hole_fraction=0.5",
            ["max_hole_fraction 0.5 says nothing with on_damage: stop", "set on_damage: hole"],
        ),
        ("data.watchdog_seconds=.inf", ["'data.watchdog_seconds' = inf", "less than or equal to 10000000"]),
        ("data.remote.timeout_seconds=.inf", ["'data.remote.timeout_seconds' = inf", "less than or equal to"]),
        ("checkpoint.keep_every=70", ["keep_every 70 is not a multiple of every_steps 50"]),
        ("engine.persistence_threshold=5", ["persistence_threshold needs zero_stage 3"]),
        ("engine={zero_stage: 0, bucket_elements: 5}", ["bucket_elements needs zero_stage 1, 2 or 3"]),
        ("evaluation={every_steps: null, sequences: 5}", ["sequences 5 has no meaning without every_steps"]),
    ],
)
def test_refusals_name_key_value_and_nearest(override: str, parts: list[str]) -> None:
    message = refusal(override)
    for part in parts:
        assert part in message


def test_all_problems_are_told_at_once() -> None:
    message = refusal("training.step=5", "optimizer.lr=-1")
    assert "training.step" in message
    assert "optimizer.lr" in message


def test_an_override_without_a_value_is_refused() -> None:
    assert "not of the form section.key=value" in refusal("training.steps")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert f"configuration file {tmp_path / 'no.yaml'} does not exist" in refusal(path=tmp_path / "no.yaml")


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run: {name: x}\n")
    message = refusal(path=path)
    for section in ("data", "model", "training"):
        assert f"'{section}' is missing" in message


def test_extends_and_overrides_win_in_order(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(DEMO.read_text())
    (tmp_path / "middle.yaml").write_text("extends: base.yaml\noptimizer: {lr: 0.5, weight_decay: 0.0}\n")
    top = tmp_path / "top.yaml"
    top.write_text("extends: middle.yaml\noptimizer: {lr: 0.25}\n")
    config = load_config(top, ["training.steps=7"])
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.training.steps) == (0.25, 0.0, 7)
    assert config.model == load_config(DEMO).model


def test_null_takes_an_inherited_mapping_away(tmp_path: Path) -> None:
    """Another file's sources can be replaced, not only joined."""
    (tmp_path / "base.yaml").write_text(DEMO.read_text())
    top = tmp_path / "top.yaml"
    top.write_text("extends: base.yaml\ndata: {sources: {code: null, web: {path: data/web}}}\n")
    assert set(load_config(top).data.sources) == {"docs", "web"}
    assert set(load_config(top, ["data.sources.docs=null"]).data.sources) == {"web"}
    assert load_config(top, ["training.steps=null", "training.tokens=9"]).training.steps is None


def test_an_inherited_method_is_turned_off_as_its_refusal_says(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(DEMO.read_text())
    top = tmp_path / "top.yaml"
    top.write_text("extends: base.yaml\nobjective: {reweighting: {strategy: uniform}}\n")
    told = "start_step and temperature have no meaning with strategy uniform; leave them out, or set reweighting=null"
    assert told in refusal("objective.reweighting.temperature=0.5", path=top)
    top.write_text("extends: base.yaml\nobjective: {reweighting: null}\n")
    off = load_config(DEMO, ["objective.reweighting=null"]).objective.reweighting
    assert load_config(top).objective.reweighting == off == ReweightingSettings()
    experts = DEMO.parent / "moe_demo.yaml"
    assert "set it to null where it is inherited" in refusal("model.experts=null", path=experts)
    assert load_config(experts, ["model.experts=null", "objective.balancing=null"]).model.experts is None


def test_extending_in_a_circle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    assert "extends itself" in refusal(path=tmp_path / "a.yaml")


def test_steps_out_of_tokens_round_up() -> None:
    config = load_config(DEMO, ["training.steps=null", "training.tokens=100_001"])
    assert config.total_steps == -(-100_001 // (config.training.global_batch * config.data.seq_len))


def test_every_setting_is_documented() -> None:
    """Every field has its sentence, as its description or right below it; a whole section speaks for itself, and the
    ``kind`` of a method is what its class says."""
    sections = {base for section in _sections(Config) for base in section.__mro__ if issubclass(base, Settings)}
    for section in sorted(sections - {Settings}, key=lambda found: found.__qualname__):
        body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in itertools.pairwise([*body.body, ast.Pass()]):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                name = field.target.id
                if name not in section.model_fields:
                    continue  # a ClassVar says what a method is, not what may be set
                documented = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                documented = documented or bool(section.model_fields[name].description) or name == "kind"
                assert documented or _sections_of(section.model_fields[name].annotation), f"{section.__name__}.{name}"


def test_every_setting_is_read_by_code() -> None:
    """Law 7: each field's name stands in code other than its own definition."""
    code = "\n".join(
        path.read_text() for package in ("pretrain", "data_pipeline") for path in (ROOT / package).rglob("*.py")
    )
    for section in _sections(Config):
        for name in section.model_fields:
            assert re.search(rf"\.{name}\b", code), f"{section.__name__}.{name} is read nowhere"


def _sections_of(annotation: object) -> list[type]:
    from data_pipeline.settings import _classes

    return [found for found in _classes(annotation) if issubclass(found, Settings)]


def _sections(schema: type) -> list[type]:
    found = [schema]
    for field in schema.model_fields.values():
        for inner in _sections_of(field.annotation):
            found += _sections(inner)
    return found
