"""`pretrain-data` as a user types it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.__main__ import main
from data_pipeline.prepare import PrepareSettings
from data_pipeline.settings import load_settings
from data_pipeline.testing import tiny_tokenizer, write_token_dataset

ROOT = Path(__file__).parents[2]


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "data_pipeline", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    common = ["sources.modules.limit_bytes=200000", "sources.documentation.limit_bytes=200000"]
    common += ["tokenizer.train.vocab_size=500", "heldout_fraction=0.2", "processes=1", f"output={folder / 'set'}"]
    config = ROOT / "configs" / "data" / "stdlib.yaml"
    made = command("tokenizer", config, *common)
    assert made.returncode == 0, made.stderr
    assert f"{folder / 'set'}/tokenizer.model: 500 pieces" in made.stdout
    written = command("prepare", config, *common)
    assert written.returncode == 0, written.stderr
    assert "write shards" in written.stderr
    assert "docs            heldout" in written.stdout
    return folder / "set"


def test_verify_says_that_every_byte_is_as_written(prepared: Path) -> None:
    done = command("verify", prepared)
    assert (done.returncode, done.stdout) == (0, f"{prepared}: every byte is as written\n")


def test_verify_ends_with_2_and_names_the_damage(prepared: Path) -> None:
    path = prepared / "shards" / "000000.tar"
    good = path.read_bytes()
    try:
        path.write_bytes(good[:1000] + bytes([good[1000] ^ 8]) + good[1001:])
        done = command("verify", prepared)
        report = json.loads(command("verify", prepared, "--json").stdout)
    finally:
        path.write_bytes(good)
    assert done.returncode == 2
    assert "damaged: shards/000000.tar, block 0, byte 640: CRC32C does not fit\n" in done.stderr
    assert done.stdout.endswith(f"{prepared}: 1 problem\n")
    assert [item["offset"] for item in report["damage"]] == [640]


def test_verify_rebuilds_an_index(prepared: Path) -> None:
    (prepared / "shards" / "000000.idx").unlink()
    done = command("verify", prepared, "--rebuild-sidecars")
    assert done.returncode == 0
    assert done.stdout.startswith("rebuilt the block index of shard 000000\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "error: data set folder nowhere does not exist. Give the folder that"),
        (["prepare", "none.yaml"], "none.yaml does not exist. Give the path of a YAML file."),
        (
            ["prepare", ROOT / "configs/data/stdlib.yaml", "tokenizer.train.vocab_sise=5"],
            "unknown key 'tokenizer.train.vocab_sise' (value 5); did you mean 'vocab_size'?",
        ),
        (["prepare", ROOT / "configs/data/stdlib.yaml", "seed=-1"], "'seed' = -1: input should be greater than or"),
    ],
)
def test_what_a_user_gets_wrong_is_one_paragraph_and_exit_code_2(arguments: list[object], message: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [["inspect"], ["verify"], ["index", "--form", "wids"]])
@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("http://me:secret@host/set?token=secret", "http://host/set"),
        ("s3://bucket/set", "s3://bucket/set"),
        ("file:///data/set", "file:///data/set"),
        ("pipe:cat /data/{}", "pipe:cat /data/{}"),
    ],
)
def test_commands_that_need_a_local_folder_refuse_an_address(
    words: list[str], address: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain-data", *words, address])
    assert main() == 2
    assert capsys.readouterr().err == (
        f"error: {told} is no folder: inspect, verify and index work on local folders only. Give the path of a data "
        "set on this machine; a remote one must be copied first.\n"
    )


def test_text_that_the_terminal_can_not_show_comes_as_escapes(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    write_token_dataset(tmp_path, {("a", "train"): [tokenizer.encode("na\u00efve \u6ce8")]})
    words = [sys.executable, "-m", "data_pipeline", "inspect", str(tmp_path), "--samples", "1"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(words, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.endswith(b"na\xefve \\u6ce8\n")


@pytest.mark.parametrize("words", [["index", "--form", "wids"], ["verify", "--rebuild-sidecars"]])
def test_a_folder_that_can_not_be_written_is_one_paragraph(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_token_dataset(tmp_path, {("a", "train"): [[10, 11]]})
    (tmp_path / "shards" / "000000.idx").unlink()

    def full_disk(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for module in ("interop", "verify"):
        monkeypatch.setattr(f"data_pipeline.{module}.publish_bytes", full_disk)
    monkeypatch.setattr(sys, "argv", ["pretrain-data", *words, str(tmp_path)])
    assert main() == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path} can't be written: No space left on device. Free space there or mend its rights, then give "
        "the same command again.\n"
    )


def test_the_command_line_does_not_wait_for_torch() -> None:
    probe = (
        "import sys, data_pipeline.__main__ as m; print(sorted({'torch', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout == "[]\n"
    probe = (
        "import sys, data_pipeline.prepare, data_pipeline.verify, data_pipeline.inspect; print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "data").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    settings = load_settings(PrepareSettings, path)
    assert settings.content["sources"]


def test_every_setting_is_documented() -> None:
    def undocumented(schema: dict[str, object]) -> list[str]:
        assert isinstance(schema, dict)
        properties = schema.get("properties", {})
        assert isinstance(properties, dict)
        plain = ("kind", "train", "domain")
        described = [name for name, field in properties.items() if {"description", "$ref"} & field.keys()]
        return sorted(properties.keys() - {*described, *plain})

    schema = PrepareSettings.model_json_schema()
    for part in [schema, *schema["$defs"].values()]:
        assert undocumented(part) == [], part["title"]
