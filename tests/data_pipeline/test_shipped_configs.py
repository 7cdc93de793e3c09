"""Every shipped data configuration builds, and the one with all stages prepares a data set that is sound."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.prepare import PrepareSettings, prepare
from data_pipeline.settings import load_settings
from data_pipeline.verify import verify_dataset

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/data").glob("*.yaml")), ids=lambda path: path.stem)
def test_builds(path: Path) -> None:
    assert load_settings(PrepareSettings, path).sources


@pytest.mark.slow
def test_cleaning_with_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    small = [
        f"output={tmp_path / 'clean'}",
        "sources.modules.limit_bytes=200000",
        "tokenizer.train.vocab_size=1000",
        "processes=1",
    ]
    manifest = prepare(load_settings(PrepareSettings, ROOT / "configs/data/stdlib_clean.yaml", small))
    assert verify_dataset(tmp_path / "clean", processes=1) == []
    assert manifest.pack_tokens == 512
    for counts in manifest.sources.values():
        rejected = sum(reason["documents"] for stage in counts["rejected"].values() for reason in stage.values())
        assert counts["records"] == counts["documents"] + counts["empty_documents"] + rejected
        assert rejected > 0
