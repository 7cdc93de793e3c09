"""The second place for checkpoints: complete or invisible there too, hashed on the way, and resumed from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data_pipeline.errors import DataError, UserError
from pretrain.checkpoint import CheckpointError, CheckpointStore, intact, intact_elsewhere, refuse_copies
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.second import SecondPlace
from pretrain.config import CheckpointSettings
from tests.ranks import run_on_ranks

from .steps import EngineRun, tiny_config
from .test_checkpoint import cut_short, flip_byte, make_checkpoint


@pytest.fixture(params=["folder", "memory", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "folder":
        yield f"{tmp_path}/elsewhere/run"
    elif request.param == "memory":
        yield "memory://checkpoints/run"
        fsspec.filesystem("memory").rm("/checkpoints", recursive=True)
    else:
        pytest.importorskip("s3fs", reason="s3 needs the extra `remote`")
        moto = pytest.importorskip("moto.server", reason="the local S3 server is moto's")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        server = moto.ThreadedMotoServer(port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        fsspec.filesystem("s3", skip_instance_cache=True).makedirs("checkpoints", exist_ok=True)
        yield f"s3://checkpoints/{tmp_path.name}/run"
        server.stop()


def test_a_copy_is_complete_or_invisible(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = SecondPlace(address)
    assert place.complete() == []
    paths = [make_checkpoint(tmp_path, step) for step in (4, 8, 12)]
    for path in paths:
        files = intact(path)
        place.put(path, files[:1])
        with pytest.raises(UserError):
            place.reveal(path.name, files)  # one file is not here yet
        assert path.name not in place.complete()
        place.put(path, files)
        assert path.name not in place.complete()
        place.reveal(path.name, files)
    names = [path.name for path in paths]
    assert place.complete() == names
    place.put(make_checkpoint(tmp_path, 16), files[:1])  # a copy that was killed on the way
    place.remove_others(lambda complete: set(complete[-2:]))
    assert SecondPlace(address).complete() == names[1:]
    assert place._names() == names[1:]
    assert place.manifest(names[2]) == files
    for file in files:
        place.fetch(names[2], file, tmp_path / "back")
        assert (tmp_path / "back" / file.path).read_bytes() == (paths[2] / file.path).read_bytes()
    monkeypatch.setattr(place._open(), "rm", refuse)  # a removal that is killed on the way
    with pytest.raises(TimeoutError):
        place.remove_others(lambda complete: set(complete[-1:]))
    assert SecondPlace(address).complete() == names[2:]


def test_a_copy_that_was_cut_off_is_never_revealed(address: str, tmp_path: Path) -> None:
    place, path = SecondPlace(address), make_checkpoint(tmp_path, 4)
    files = intact(path)
    place.put(path, files)
    with place._writing(f"{path.name}/{files[0].path}") as handle:
        handle.write((path / files[0].path).read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"has {files[0].bytes - 1} bytes instead of {files[0].bytes}"):
        place.reveal(path.name, files)
    assert path.name not in place.complete()


def test_damage_on_the_way_is_seen(address: str, tmp_path: Path) -> None:
    place, path = SecondPlace(address), make_checkpoint(tmp_path, 4)
    files = intact(path)
    place.put(path, files)
    place.reveal(path.name, files)
    flip_byte(path / "state.json")
    with pytest.raises(DataError, match=r"state\.json has other content"):
        place.put(path, files)  # and leaves flipped bytes there
    with pytest.raises(DataError, match=r"state\.json has other content"):
        place.fetch(path.name, files[1], tmp_path / "back")
    assert not (tmp_path / "back" / "state.json").exists()


def copies(root: Path) -> None:
    from pretrain.distributed import start

    ranks = start(60)
    run = EngineRun(tiny_config(engine={"zero_stage": 1}), ranks)
    run.step(0)

    def store(
        name: str, path: Path | str | None = None, keep_every: int | None = None, **second: object
    ) -> CheckpointStore:
        kept = {"every_steps": 1, "keep_last": 1, "keep_every": keep_every}
        settings = CheckpointSettings.model_validate(
            {**kept, "asynchronous": True, "second": {"path": str(path or root / "second"), **second}}
        )
        return CheckpointStore(root / "runs" / name / "checkpoints", settings, ranks)

    def on_rank_0(action: object, *arguments: object) -> None:
        if ranks.rank == 0:
            action(*arguments)  # type: ignore[operator]
        ranks.barrier()

    kept = store("kept")
    for step in (1, 2, 3):
        kept.begin_save(run.engine, {"step": step, "topology": {"world_size": 2, "zero_stage": 1}})
        saved = kept.finish_save()
        assert saved is not None
        assert saved.copied_to == f"{root}/second/kept/step_00000000{step}"
    assert saved.warning is None
    there = sorted(path.name for path in (root / "second" / "kept").iterdir())
    assert there == ["step_000000002", "step_000000003"]
    assert read_manifest(root / "second/kept/step_000000003") == read_manifest(saved.path)
    files, layout, state = intact_elsewhere(f"file://{root}/second/kept/step_000000003")
    assert len(files) == len(intact(saved.path))
    assert layout.shapes
    assert state["step"] == 3

    # the first place is as new: nothing is fetched; lost: the newest copy is; that damaged: the one before, and told
    fresh = store("kept")
    fresh._second.fetch = refuse  # type: ignore[union-attr, method-assign]
    assert fresh.find() == (saved.path, [])
    on_rank_0(shutil.rmtree, saved.path)
    assert store("kept").find() == (saved.path, [])
    assert intact(saved.path)
    store("kept").load(saved.path, run.engine)
    ranks.barrier()
    on_rank_0(cut_short, saved.path / "state.json")
    on_rank_0(flip_byte, root / "second/kept/step_000000003/state.json")
    found, told = store("kept").find()
    assert found == saved.path.with_name("step_000000002")
    assert [("damaged" in line or "bytes instead" in line or "other content" in line) for line in told] == [True, True]
    assert intact(found)
    ranks.barrier()
    assert not list(found.parent.glob(".saving*")), "what could not be fetched whole"

    # kept there: the newest by its own count, those for good, and what was saved just now, though another's is newer
    good = store("good", keep_every=2, keep_last=1)
    on_rank_0(make_checkpoint, root / "second" / "good", 9)
    for step in (1, 2, 3):
        good.save(run.engine, {"step": step})
    there = sorted(path.name for path in (root / "second" / "good").iterdir())
    assert there == ["step_000000002", "step_000000003", "step_000000009"]

    # a place that can't be written: loud, or the end
    on_rank_0((root / "file").write_text, "")
    loud = store("louder", root / "file")
    loud.begin_save(run.engine, {"step": 1})
    saved = loud.finish_save()
    assert saved is not None
    assert intact(saved.path)
    assert "is saved below" in (saved.warning or "")
    assert f"could not be copied to {root}/file/louder/step_000000001: rank 0: " in (saved.warning or "")
    one = store("one")
    if ranks.rank == 1:
        one._second.put = refuse  # type: ignore[union-attr, method-assign]
    one.begin_save(run.engine, {"step": 1})
    saved = one.finish_save()
    assert saved is not None
    assert f"to {root}/second/one/step_000000001: rank 1: TimeoutError: no answer." in (saved.warning or "")
    strict = store("strict", root / "file", on_failure="stop")
    with pytest.raises(CheckpointError, match=r"could not be copied .*on_failure=warn"):
        strict.save(run.engine, {"step": 1})
    assert intact(root / "runs/strict/checkpoints/step_000000001")
    # nothing here, and no telling what is there: never a silent start from step 0
    lost = store("lost")
    lost._second._store.exists = refuse  # type: ignore[union-attr, method-assign]
    on_rank_0(make_checkpoint, root / "second" / "lost", 9)
    with pytest.raises(DataError, match=f"whether there is a checkpoint in {root}/second/lost can't be seen: Tim"):
        lost.find()
    kept = store("kept")
    kept._second._store.exists = refuse  # type: ignore[union-attr, method-assign]
    found_again, told = kept.find()
    assert found_again == found
    assert f"whether there is a newer checkpoint in {root}/second/kept can't be seen" in told[-1]


def refuse(*arguments: object, **options: object) -> bool:
    raise TimeoutError("no answer")


def test_copies_of_two_ranks(tmp_path: Path) -> None:
    run_on_ranks(copies, 2, tmp_path)


def test_starting_over_does_not_take_an_earlier_runs_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = CheckpointSettings.model_validate({"second": {"path": os.fspath(tmp_path)}})
    refuse_copies(settings, "run")
    make_checkpoint(tmp_path / "run", 4)
    refuse_copies(settings, "other")
    with pytest.raises(UserError, match=f"resume=never: {tmp_path}/run holds 1 checkpoints of an earlier run"):
        refuse_copies(settings, "run")
    monkeypatch.setattr(SecondPlace, "complete", refuse)
    with pytest.raises(UserError, match=f"resume=never: {tmp_path}/other TimeoutError: no answer"):
        refuse_copies(settings, "other")
