"""The ledger of holes: all ranks, all attempts, each position once, and nothing that a later attempt has redone."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

from data_pipeline.damage import Damage, DamagedBlockError, DamageLedger, read_ledger, told_by_block


def hole(position: int, block: int = 3) -> Damage:
    return Damage(position, "web", 1000 + position, "000002", block, 132_736, "checksum")


def positions(folder: Path) -> list[int]:
    return [entry.damage.position for entry in read_ledger(folder)]


def test_holes_of_all_ranks_come_back_in_the_order_of_their_positions(tmp_path: Path) -> None:
    for rank in (1, 0):
        with DamageLedger(tmp_path / "damage", rank) as ledger:
            ledger.add(7, [hole(30 + rank), hole(20 + rank)])
            ledger.add(8, [])
    entries = read_ledger(tmp_path / "damage")
    assert [(entry.rank, entry.step, entry.damage) for entry in entries] == [
        (0, 7, hole(20)), (1, 7, hole(21)), (0, 7, hole(30)), (1, 7, hole(31)),
    ]  # fmt: skip


def test_a_step_is_in_the_file_when_add_returns(tmp_path: Path) -> None:
    ledger = DamageLedger(tmp_path, 0)
    ledger.add(1, [hole(5)])
    assert positions(tmp_path) == [5]
    line = json.loads((tmp_path / "rank00000.jsonl").read_text().splitlines()[1])
    assert line == {
        "attempt": 0, "step": 1, "rank": 0, "position": 5, "source": "web", "sample": 1005, "shard": "000002",
        "block": 3, "offset": 132_736, "reason": "checksum",
    }  # fmt: skip
    ledger.close()


def test_damage_is_told_once_a_block() -> None:
    holes = [hole(position, block) for block in (3, 9, 4, 5, 6) for position in range(block)]
    told = told_by_block([*holes[:4], *holes])
    assert told == (
        "shard 000002 of source 'web', block 3 at byte 132736: checksum (6 sequences); "
        "shard 000002 of source 'web', block 9 at byte 132736: checksum (10 sequences); "
        "shard 000002 of source 'web', block 4 at byte 132736: checksum (4 sequences) and 2 more blocks"
    )
    assert told_by_block([hole(1), hole(1, 9)], most=1).endswith("(1 sequence) and 1 more block")
    assert "checksum" in hole(1).place
    assert "`pretrain-data verify --rebuild-sidecars FOLDER` writes it again" in replace(hole(1), reason="index").place
    assert told_by_block([hole(1)]) == "shard 000002 of source 'web', block 3 at byte 132736: checksum (1 sequence)"


def test_a_stop_on_damage_says_how_to_go_on() -> None:
    error = DamagedBlockError("shard x is damaged. Restore it.", "000001", 3, 640, "checksum")
    for each in (error, pickle.loads(pickle.dumps(error))):
        assert str(each) == (
            "shard x is damaged. Restore it. If it can't be restored, data.on_damage=hole lets a run go on without the "
            "damaged blocks, as long as no more than data.max_hole_fraction of its sequences are lost."
        )
        assert (each.shard, each.block, each.offset, each.reason) == ("000001", 3, 640, "checksum")


def test_a_position_that_is_met_again_counts_once(tmp_path: Path) -> None:
    for rank in (0, 1):
        with DamageLedger(tmp_path, rank) as ledger:
            ledger.add(1, [hole(5), hole(6)])
    assert positions(tmp_path) == [5, 6]


def test_what_a_later_attempt_has_redone_counts_no_more(tmp_path: Path) -> None:
    """The first attempt dies at position 90; its last checkpoint is of 40; the second one finds 50 mended."""
    with DamageLedger(tmp_path, 0, attempt=1, position=0) as ledger:
        ledger.add(1, [hole(10), hole(39)])
        ledger.add(2, [hole(40), hole(50)])
    with DamageLedger(tmp_path, 1, attempt=1, position=0) as ledger:
        ledger.add(2, [hole(60)])
    with DamageLedger(tmp_path, 0, attempt=2, position=40) as ledger:
        assert positions(tmp_path) == [10, 39]
        ledger.add(2, [hole(40), hole(70)])
    assert positions(tmp_path) == [10, 39, 40, 70]


def test_a_half_written_line_is_left_out_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    with DamageLedger(tmp_path, 0) as ledger:
        ledger.add(1, [hole(5)])
    path = tmp_path / "rank00000.jsonl"
    whole = path.read_bytes()
    for cut in range(1, 40, 7):
        path.write_bytes(whole[:-cut])
        assert positions(tmp_path) == ([5] if cut == 1 else [])
        with DamageLedger(tmp_path, 0) as ledger:
            ledger.add(2, [hole(9)])
        assert positions(tmp_path) == ([5, 9] if cut == 1 else [9])


def test_no_ledger_is_no_damage(tmp_path: Path) -> None:
    assert read_ledger(tmp_path / "nowhere") == []
