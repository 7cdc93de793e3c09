"""`explain` and `when-seen` where a run has lost rows to damage, and where tables of documents are lost since."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import DataError
from data_pipeline.damage import DAMAGE_FOLDER, Damage, DamageLedger, Reason
from data_pipeline.explain import ExplainedRow, describe, explain
from data_pipeline.history import Stretch, record_stretch
from data_pipeline.layout import documents_path
from data_pipeline.manifest import read_manifest
from data_pipeline.stream import StreamSettings
from data_pipeline.testing import write_token_dataset
from data_pipeline.when_seen import describe as describe_seen
from data_pipeline.when_seen import when_seen

BATCH, STEPS = 12, 8


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run over three shards, beside its data set ``data``."""
    random = np.random.default_rng(3)
    documents = [random.integers(4, 300, random.integers(1, 60)).tolist() for _ in range(90)]
    data = tmp_path / "data"
    write_token_dataset(data, {("a", "train"): documents}, documents_per_shard=30)
    sources = {"a": {"path": str(data), "max_epochs": None}}
    there = Stretch(
        first_step=0, first_position=0, end_step=STEPS, world_size=2, micro_batch=3, global_batch=BATCH, ramp=(),
        skip_ranges=(), seed=5, stream=StreamSettings.model_validate({"seq_len": 16, "sources": sources}),
        data_sets={"a": read_manifest(data).identity},
    )  # fmt: skip
    (tmp_path / "run").mkdir()
    record_stretch(tmp_path / "run", there)
    return tmp_path / "run"


def rows_of(run: Path, with_text: bool = False) -> list[ExplainedRow]:
    return [row for step in range(1, STEPS + 1) for row in explain(run, step, None, None, with_text)]


def hole(row: ExplainedRow, reason: Reason) -> Damage:
    return Damage(row.position, row.source, row.sequence, row.shard, row.block, row.offset, reason)


def test_a_hole_is_told_and_names_no_document(run: Path) -> None:
    """The first attempt dies in step 6; the second begins with step 4: a block was mended, another is gone since."""
    rows = {row.position: row for row in rows_of(run)}
    kept, mended, worse, found = 3, 3 * BATCH + 2, 4 * BATCH + 7, 7 * BATCH
    folder = run / DAMAGE_FOLDER
    with DamageLedger(folder, 0, attempt=1, position=0) as ledger:
        for position in (kept, mended, worse):
            ledger.add(rows[position].step, [hole(rows[position], "checksum")])
    with DamageLedger(folder, 1, attempt=2, position=3 * BATCH) as ledger:
        for position in (worse, found):
            ledger.add(rows[position].step, [hole(rows[position], "missing")])
    expected = {kept: "checksum", worse: "missing", found: "missing"}

    for row in rows_of(run, with_text=True):
        before = asdict(rows[row.position])
        told = json.loads(json.dumps(asdict(row)))
        if reason := expected.get(row.position):
            assert (told["hole"], told["documents"]) == (reason, [])
            assert describe(row).splitlines()[1:] == [f"  a hole ({reason}): nothing was read"]
        else:
            assert told["hole"] is None
            assert [part["id"] for part in told["documents"]] == [part["id"] for part in before["documents"]]
            assert "a hole" not in describe(row)

    for position in rows:
        for part in rows[position].documents[:1]:
            (seen,) = (each for each in when_seen(run, part.id) if each.position == position)
            assert seen.hole == expected.get(position)
            mark = f": a hole ({seen.hole}): nothing was read"
            assert describe_seen(seen).endswith(mark if seen.hole else part.url)


def test_documents_are_named_from_the_table_that_was_written_only(run: Path) -> None:
    data = run.parent / "data"
    missing, other, whole = (documents_path(data, f"{number:06d}") for number in range(3))
    written = {path: path.read_bytes() for path in (missing, other)}
    missing.unlink()
    shutil.copy(whole, other)  # a table as good as any, but of another shard

    told: list[ExplainedRow] = []
    with pytest.raises(DataError) as raised:
        told.extend(explain(run, 2, None, None, False))
    message = str(raised.value)
    lost = BATCH - len(told)
    assert message.startswith(f"the documents of {lost} rows of step 2 are not known: the document table {data}")
    assert f"the document table {missing} is missing" in message
    wrong = rf"the document table {other} is not the one that was written: its SHA-256 is \w{{12}}, the manifest says "
    assert re.search(wrong, message)
    assert message.endswith("can't be rebuilt from its shard: restore it from a copy.")
    with pytest.raises(DataError, match=r"is missing\. A table of .* restore it from a copy\."):
        when_seen(run, "synthetic:a/train/80")
    missing.write_bytes(b"")
    with pytest.raises(DataError, match=f"the document table {missing} is not the one that was written"):
        when_seen(run, "synthetic:a/train/80")

    for path, content in written.items():
        path.write_bytes(content)
    rows = list(explain(run, 2, None, None, False))
    assert len(rows) == BATCH
    assert told == [row for row in rows if row.shard == "000002"]
    assert told


def test_a_hole_needs_no_table(run: Path) -> None:
    with DamageLedger(run / DAMAGE_FOLDER, 0) as ledger:
        ledger.add(1, [Damage(5, "a", 0, "000000", 0, 0, "checksum")])
    for path in (run.parent / "data" / "shards").glob("*.docs.parquet"):
        path.unlink()
    told: list[ExplainedRow] = []
    with pytest.raises(DataError, match=f"the documents of {BATCH - 1} rows of step 1 are not known"):
        told.extend(explain(run, 1, None, None, True))
    assert [(row.position, row.hole) for row in told] == [(5, "checksum")]
