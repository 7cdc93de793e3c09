"""Pieces of remote shards: what is known of damage is not asked for again, and what nobody opens holds nothing up."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import pytest

from data_pipeline.damage import DamagedBlockError, OnDamage
from data_pipeline.layout import shard_path
from data_pipeline.manifest import read_manifest
from data_pipeline.remote_shards import RemoteShards
from data_pipeline.storage import CacheSettings, RemoteSettings, StorageSettings, open_store
from data_pipeline.testing import write_token_dataset
from tests.http_server import HttpServer

BLOCK, DAMAGED = 64, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of over 16 blocks; a bit is turned in block 3 of the first."""
    folder = tmp_path_factory.mktemp("pieces") / "data"
    documents = [[10 + number % 200] * 50 for number in range(50)]
    manifest = write_token_dataset(folder, {("web", "train"): documents}, block_tokens=BLOCK, documents_per_shard=25)
    assert min(manifest.shards.blocks) >= 16
    path = shard_path(folder, "000000")
    content = bytearray(path.read_bytes())
    content[manifest.layout.data_offset(DAMAGED)] ^= 1
    path.write_bytes(content)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[HttpServer]:
    with HttpServer(folder) as running:
        yield running


def pieces_of(folder: Path, server: HttpServer, tmp_path: Path, on_damage: OnDamage = "hole") -> RemoteShards:
    remote = RemoteSettings(parallel=1, first_backoff_seconds=0.001, longest_backoff_seconds=0.01)
    storage = StorageSettings(cache=CacheSettings(folder=str(tmp_path / "cache")), remote=remote)
    manifest = read_manifest(folder)
    return RemoteShards(open_store(server.url, storage), manifest.shards, manifest.layout, on_damage)


@pytest.mark.parametrize("span", [(0, 8), None])
def test_a_damaged_piece_is_fetched_once_though_it_falls_out_of_the_open_files(
    folder: Path, server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, span: tuple[int, int] | None
) -> None:
    monkeypatch.setattr("data_pipeline.remote_shards.open_files_limit", lambda: 1)
    pieces = pieces_of(folder, server, tmp_path)
    pieces.open(0, 0, span)
    pieces.open(1, 0, span)
    asked = server.gets.total()
    for _ in range(3):
        pieces.open(0, 0, span)
        pieces.open(1, 0, span)
    assert server.gets.total() == asked
    shutil.rmtree(tmp_path / "cache")
    pieces.open(0, 0, span)
    assert server.gets.total() > asked, "what is gone from the cache is fetched again"


def test_pieces_that_nobody_opens_hold_nothing_up(folder: Path, server: HttpServer, tmp_path: Path) -> None:
    """So it is with those whose wanted blocks are known to be damaged: they are asked for ahead, and not read."""
    pieces = pieces_of(folder, server, tmp_path)
    pieces.ahead(0, (4, 8))
    pieces.ahead(0, (8, 12))
    wait(pieces._coming.values())
    assert pieces.busy, "so many are asked for ahead, and no more"
    pieces.open(1, 0, (0, 4))
    assert not pieces.busy
    asked = server.gets.total()
    for first in (4, 8):
        pieces.open(0, first, (first, first + 4))
    assert server.gets.total() == asked
    pieces.close()


@pytest.mark.parametrize("span", [(0, 8), None])
def test_under_stop_what_stays_damaged_is_not_fetched_for_each_of_its_blocks(
    folder: Path, server: HttpServer, tmp_path: Path, span: tuple[int, int] | None
) -> None:
    pieces = pieces_of(folder, server, tmp_path, "stop")
    asked: list[int] = []
    for block in (0, 1, 5, 6):
        for _ in range(2):
            with pytest.raises(DamagedBlockError, match=rf"block {DAMAGED} at byte offset .* is damaged: its CRC32C"):
                pieces.open(0, block, span)
            if not pieces.again(0, span):
                break
        asked.append(server.gets.total())
    assert asked[0] > 1, "damage is looked at once more, for it may come from the network"
    assert asked[-1] == asked[0]
    pieces.open(1, 0, span)


@pytest.mark.parametrize("span", [(0, 8), None])
def test_copies_of_a_data_set_do_not_take_each_others_damage_from_the_cache(
    folder: Path, server: HttpServer, tmp_path: Path, span: tuple[int, int] | None
) -> None:
    """The copy has another block damaged. Once a block was right it is not checked again: no other file may come."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    layout = read_manifest(folder).layout
    offsets = [layout.data_offset(block) for block in (DAMAGED, DAMAGED + 2)]
    path = shard_path(copy, "000000")
    content = bytearray(path.read_bytes())
    for offset in offsets:
        content[offset] ^= 1
    path.write_bytes(content)

    def found(pieces: RemoteShards) -> list[bytes]:
        pieces.close()
        file, read = pieces.open(0, 0, span), bytearray(2)
        return [bytes(read) for offset in offsets if file.read(memoryview(read), offset)]

    with HttpServer(copy) as other:
        both = [pieces_of(folder, server, tmp_path), pieces_of(copy, other, tmp_path)]
        first = [found(pieces) for pieces in both]
        assert first[0][0] != first[1][0]
        assert first[0][1] != first[1][1]
        for _ in range(2):
            assert [found(pieces) for pieces in both] == first
