from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from data_pipeline.errors import UserError
from data_pipeline.manifest import read_manifest
from data_pipeline.prepare import PrepareSettings, make_tokenizer
from data_pipeline.prepare.workspace import open_workspace
from data_pipeline.settings import build_settings
from data_pipeline.shard_reading import read_documents
from data_pipeline.testing import tiny_tokenizer
from tests.data_pipeline.prepared import hashes, make_texts, run, stored

PROSE = [*make_texts(300, 1), *make_texts(300, 1)[:40]]
VERSE = make_texts(120, 2)


@pytest.fixture
def plain(tmp_path: Path) -> dict[str, Any]:
    """Plain settings: two domains, one in two sources, duplicates and empty documents, eight or so shards."""
    for name, texts in {"a": PROSE[:170], "b": [*PROSE[170:], ""], "c": ["", *VERSE, ""]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "given.model").write_bytes(tiny_tokenizer().model)

    def source(name: str, domain: str) -> dict[str, Any]:
        return {"kind": "jsonl", "domain": domain, "files": [str(tmp_path / f"{name}.jsonl")]}

    return {
        "output": str(tmp_path / "set"),
        "seed": 7,
        "tokenizer": {"path": str(tmp_path / "given.model")},
        "sources": {"first": source("a", "prose"), "second": source("b", "prose"), "third": source("c", "verse")},
        "heldout_fraction": 0.1,
        "block_tokens": 64,
        "shard_tokens": 6000,
        "part_bytes": 8000,
        "processes": 1,
    }


def test_a_folder_prepared_anew_takes_the_tokenizer_that_is_there_now(plain: dict[str, Any], tmp_path: Path) -> None:
    run(plain)
    shutil.rmtree(tmp_path / "set")
    (tmp_path / "given.model").write_bytes(tiny_tokenizer(390).model)
    manifest = run(plain)
    before, now = (
        sum(len(tokenizer.encode(text)) + 1 for text in [*PROSE, *VERSE])
        for tokenizer in (tiny_tokenizer(), tiny_tokenizer(390))
    )
    assert manifest.shards.tokens.sum() == now != before


def split_of(text: str) -> str:
    identity = blake2b(text.encode(), digest_size=16).digest()
    draw = int.from_bytes(blake2b(identity, digest_size=8, key=b"heldout").digest(), "little")
    return "heldout" if draw < 0.1 * 2**64 else "train"


def place(text: str, seed: int) -> int:
    identity = blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(blake2b(identity, digest_size=8, key=seed.to_bytes(8, "little")).digest(), "little")


def test_the_order_is_that_of_the_keyed_hashes(plain: dict[str, Any]) -> None:
    manifest = run(plain)
    folder = Path(plain["output"])
    for domain, texts in (("prose", PROSE), ("verse", VERSE)):
        for split in ("train", "heldout"):
            expected = sorted((text for text in texts if split_of(text) == split), key=lambda text: place(text, 7))
            assert stored(folder, domain, split) == expected
            shards = manifest.select(domain, split)
            tokens = sum(shard.tokens for shard in shards)
            assert len(shards) == -(-tokens // 6000)
            assert sum(shard.text_bytes for shard in shards) == sum(len(text.encode()) for text in expected)
            rows = [row for shard in shards for row in read_documents(folder, shard).to_pylist()]
            assert [row["id"] for row in rows] == [blake2b(t.encode(), digest_size=16).hexdigest() for t in expected]
    assert len(manifest.select("prose", "train")) >= 3


def test_shard_k_holds_the_keys_of_its_range(plain: dict[str, Any]) -> None:
    shards = run(plain).select("prose", "train")
    folder = Path(plain["output"])
    for k, shard in enumerate(shards):
        for row in read_documents(folder, shard).to_pylist():
            draw = blake2b(bytes.fromhex(row["id"]), digest_size=8, key=(7).to_bytes(8, "little")).digest()
            assert k <= int.from_bytes(draw, "little") / 2**64 * len(shards) < k + 1


def test_the_bytes_depend_on_seed_and_content_only(plain: dict[str, Any], tmp_path: Path) -> None:
    run(plain)
    expected = hashes(tmp_path / "set")
    assert len(expected) > 15
    for changes in ({"part_bytes": 2500}, {"part_bytes": 1 << 20}, {"processes": 2, "part_bytes": 30_000}):
        run(plain, output=str(tmp_path / "other"), **changes)
        assert hashes(tmp_path / "other") == expected, changes
        subprocess.run(["rm", "-r", tmp_path / "other"], check=True)
    reseeded = run(plain, output=str(tmp_path / "other"), seed=8)
    assert reseeded.identity != read_manifest(tmp_path / "set").identity
    for split in ("train", "heldout"):
        first, second = (stored(tmp_path / name, "prose", split) for name in ("set", "other"))
        assert first != second
        assert sorted(first) == sorted(second)


def test_order_of_sources_and_input_does_not_matter(plain: dict[str, Any], tmp_path: Path) -> None:
    first = run(plain)
    sources = dict(reversed(plain["sources"].items()))
    assert run(plain, output=str(tmp_path / "other"), sources=sources).shards == first.shards, "duplicates go by url"
    for name in ("a", "b", "c"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert run(plain, output=str(tmp_path / "third")).identity == first.identity


def test_counts(plain: dict[str, Any]) -> None:
    manifest = run(plain)
    prose, verse = sum(len(t.encode()) for t in PROSE), sum(len(t.encode()) for t in VERSE)
    assert manifest.sources["first"]["documents"] + manifest.sources["second"]["documents"] == len(PROSE)
    assert [source["empty_documents"] for source in manifest.sources.values()] == [0, 1, 2]
    assert [source["inexact_documents"] for source in manifest.sources.values()] == [0, 0, 0]
    assert manifest.sources["first"]["text_bytes"] + manifest.sources["second"]["text_bytes"] == prose
    assert manifest.sources["third"]["text_bytes"] == verse
    tokens = sum(source["tokens"] for source in manifest.sources.values())
    assert tokens == sum(shard.tokens for shard in manifest.shards)
    assert tokens == sum(len(tiny_tokenizer().encode(text)) + 1 for text in PROSE + VERSE)


def _tar(path: Path, samples: list[tuple[str, str, dict[str, Any]]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, text, about in samples:
            for name, content in ((f"{key}.txt", text), (f"{key}.json", json.dumps(about))):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content.encode()))


def test_metadata_stands_in_the_document_table(plain: dict[str, Any], tmp_path: Path) -> None:
    """With sorted keys; among documents of equal text, the url and then the metadata decide the order."""
    for number, score in ((1, "z"), (2, "a")):
        (tmp_path / str(number)).mkdir()
        _tar(tmp_path / str(number) / "t.tar", [("k", "equal", {"score": score, "at": {"y": [2], "b": 1}})])
    source = {"kind": "webdataset", "domain": "d", "text_extension": "txt"}

    def table(*order: int) -> list[dict[str, Any]]:
        sources = {f"s{n}": {**source, "files": [str(tmp_path / str(n) / "t.tar")]} for n in order}
        folder = tmp_path / f"set{order}"
        manifest = run(plain, sources=sources, heldout_fraction=0.0, output=str(folder))
        return [row for shard in manifest.shards for row in read_documents(folder, shard).to_pylist()]

    rows = table(2, 1)
    assert [row["url"] for row in rows] == [f"{tmp_path}/{number}/t.tar#k" for number in (1, 2)]
    assert [row["metadata"] for row in rows] == [
        f'{{"json": {{"at": {{"b": 1, "y": [2]}}, "score": "{score}"}}}}' for score in ("z", "a")
    ]
    assert table(1, 2) == rows


def test_metadata_is_json_that_anybody_reads(plain: dict[str, Any], tmp_path: Path) -> None:
    """JSON has no NaN (RFC 8259, section 6), though Python writes and reads it."""
    line = '{"text": "a", "score": NaN, "more": {"x": [1.5, Infinity, -Infinity]}}\n'
    (tmp_path / "a.jsonl").write_text(line)
    source = {**plain["sources"]["first"], "metadata_fields": ["score", "more"]}
    manifest = run(plain, sources={"first": source}, heldout_fraction=0)
    (row,) = read_documents(tmp_path / "set", manifest.shards[0]).to_pylist()
    assert row["metadata"] == '{"more": {"x": [1.5, "Infinity", "-Infinity"]}, "score": "NaN"}'


def test_a_source_without_metadata_has_an_empty_column(plain: dict[str, Any], tmp_path: Path) -> None:
    shard = run(plain).shards[0]
    assert set(read_documents(tmp_path / "set", shard)["metadata"].to_pylist()) == {""}


def test_a_domain_without_held_out_documents_is_said(plain: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run(plain, heldout_fraction=1e-9)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert said == [
        f"warning: domain {domain!r} has no held-out document: none of its few fell into heldout_fraction = 1e-09. It "
        "can't be evaluated; raise heldout_fraction, or add text."
        for domain in ("prose", "verse")
    ]


def test_documents_of_a_lossy_tokenizer_are_counted(plain: dict[str, Any], tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE), model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    (tmp_path / "given.model").write_bytes(model.getvalue())
    assert run(plain).sources["third"]["inexact_documents"] == len(VERSE)


def test_a_finished_data_set_is_left_alone(plain: dict[str, Any], tmp_path: Path) -> None:
    first = run(plain)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "set" / "shards").iterdir()}
    assert run(plain, processes=2) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set" / "shards").iterdir()} == times


def test_a_change_between_two_starts_is_named(plain: dict[str, Any], tmp_path: Path) -> None:
    run(plain)
    with pytest.raises(UserError, match=r"set was begun with something else: settings\.seed was 7, now it is 8\. Give"):
        run(plain, seed=8)
    with pytest.raises(UserError, match=r"part_bytes was 8000, now it is 9000"):
        run(plain, part_bytes=9000)
    with pytest.raises(UserError, match=r"settings\.sources\.third\.domain was 'verse', now it is 'poems'"):
        run(plain, sources={**plain["sources"], "third": {**plain["sources"]["third"], "domain": "poems"}})
    path = tmp_path / "a.jsonl"
    before = path.read_bytes()
    path.write_bytes(before + b"\n")
    with pytest.raises(UserError, match=rf"input\.first\..*a\.jsonl had {len(before):,} bytes, now it has"):
        run(plain)
    (tmp_path / "given.model").write_bytes(tiny_tokenizer(310).model)
    with pytest.raises(UserError, match=r"begun with something else: sha256 was '[0-9a-f]{64}', now it is"):
        run(plain)


def test_a_trained_tokenizer_is_made_once_and_by_either_command(plain: dict[str, Any], tmp_path: Path) -> None:
    train = {"train": {"model_type": "bpe", "vocab_size": 330}}
    made = make_tokenizer(build_settings(PrepareSettings, {**plain, "tokenizer": train}, "test"))
    assert run(plain, tokenizer=train).tokenizer_sha256 == made.sha256
    assert run(plain, tokenizer=train, output=str(tmp_path / "other")).tokenizer_sha256 == made.sha256
    with pytest.raises(UserError, match=r"tokenizer\.train\.vocab_size was 330, now it is 340"):
        run(plain, tokenizer={"train": {"model_type": "bpe", "vocab_size": 340}})


def test_only_one_prepare_at_a_time(plain: dict[str, Any], tmp_path: Path) -> None:
    with (
        open_workspace(tmp_path / "set"),
        pytest.raises(UserError, match=r"another process is preparing .*set\. Wait for it"),
    ):
        run(plain)
    run(plain)


def test_wrong_inputs_and_folders(plain: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    empty = {"kind": "jsonl", "domain": "d", "files": [str(tmp_path / "empty.jsonl")]}
    with pytest.raises(UserError, match=r"source 'none' holds no document but 1 empty ones"):
        run(plain, sources={**plain["sources"], "none": empty}, output=str(tmp_path / "one"))
    with pytest.raises(UserError, match=r"sources \(none\) hold no text to train a tokenizer on"):
        run(plain, sources={"none": empty}, tokenizer={"train": {"vocab_size": 400}}, output=str(tmp_path / "two"))
    with pytest.raises(UserError, match=r"output folder .*given\.model/set can't be written: Not a directory"):
        run(plain, output=str(tmp_path / "given.model" / "set"))
    with pytest.raises(UserError, match=r"tokenizer file .*nothing\.model does not exist"):
        run(plain, tokenizer={"path": str(tmp_path / "nothing.model")}, output=str(tmp_path / "three"))
    with pytest.raises(UserError, match=r"a\.jsonl is not a SentencePiece model"):
        run(plain, tokenizer={"path": str(tmp_path / "a.jsonl")}, output=str(tmp_path / "four"))
    with pytest.raises(UserError, match=r"give exactly one of tokenizer\.path and tokenizer\.train"):
        run(plain, tokenizer={})
    with pytest.raises(UserError, match=r"shard_tokens 100000000 is over 500,000 blocks"):
        run(plain, shard_tokens=100_000_000)
    (tmp_path / "foreign" / "shards").mkdir(parents=True)
    with pytest.raises(UserError, match=r"foreign holds a data set that was not prepared there"):
        run(plain, output=str(tmp_path / "foreign"))


def test_a_bad_record_stops_a_parallel_prepare(plain: dict[str, Any], tmp_path: Path) -> None:
    with open(tmp_path / "b.jsonl", "a") as handle:
        handle.write("{\n")
    with pytest.raises(UserError, match=r"b\.jsonl, line 172: not valid JSON"):
        run(plain, processes=2)
