"""The order ``full``: epochs, independence of sources, the inverse, the epoch check and what a resume compares."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.mixture import Phase
from data_pipeline.order import Order, OrderSource, difference
from data_pipeline.permutation import LARGEST

SMALL = [OrderSource("code", 1000, 3), OrderSource("docs", 7, 1), OrderSource("one", 1, 0.5)]


def samples(order: Order, name: str, start: int, count: int) -> list[tuple[int, int]]:
    """The (epoch, sequence) pairs that a source gives within some positions, in order."""
    located = order.locate(start, count)
    here = located.source == [source.name for source in order.sources].index(name)
    return list(zip(located.epoch[here].tolist(), located.sequence[here].tolist(), strict=True))


def test_every_epoch_of_every_source_holds_each_sequence_once_and_epochs_follow_one_another() -> None:
    order = Order(0, SMALL)
    for source in SMALL:
        drawn = samples(order, source.name, 0, 20_000)
        assert [epoch for epoch, _ in drawn] == [j // source.sequences for j in range(len(drawn))]
        whole = len(drawn) // source.sequences
        assert whole >= 10
        for epoch in range(whole):
            rows = drawn[epoch * source.sequences : (epoch + 1) * source.sequences]
            assert sorted(sequence for _, sequence in rows) == list(range(source.sequences))
    first, second = (samples(order, "code", 0, 20_000)[k * 1000 : (k + 1) * 1000] for k in (0, 1))
    assert [sequence for _, sequence in first] != [sequence for _, sequence in second]


def test_a_source_may_be_smaller_than_a_batch() -> None:
    order = Order(0, [OrderSource("tiny", 3)])
    located = order.locate(0, 3000)
    assert located.epoch.tolist() == [j // 3 for j in range(3000)]
    rows = located.sequence.reshape(1000, 3)
    assert np.array_equal(np.sort(rows, axis=1), np.tile(np.arange(3), (1000, 1)))
    assert len(np.unique(rows, axis=0)) == 6


def test_adding_reweighing_or_reordering_sources_leaves_the_samples_of_the_others_in_order() -> None:
    few = Order(5, SMALL[:2])
    more = Order(
        5,
        [OrderSource("new", 50, 2), SMALL[1], OrderSource("code", 1000, 0.1)],
        [Phase(77, {"new": 1, "docs": 1, "code": 9})],
    )
    for name in ("code", "docs"):
        one, other = samples(few, name, 0, 30_000), samples(more, name, 0, 30_000)
        shared = min(len(one), len(other))
        assert shared > 1500
        assert one[:shared] == other[:shared]


def test_sources_of_equal_size_are_shuffled_apart() -> None:
    order = Order(0, [OrderSource("a", 500), OrderSource("b", 500)])
    assert samples(order, "a", 0, 900)[:400] != samples(order, "b", 0, 900)[:400]


@pytest.mark.parametrize("start", [0, 5, 65_000, 99_990, 1_000_000])
def test_the_inverse_finds_every_position(start: int) -> None:
    order = Order(1, SMALL, [Phase(100_001, {"code": 1, "docs": 1, "one": 0})])
    located = order.locate(start, 1500)
    for source in range(3):
        here = located.source == source
        found = order.position_of(source, located.sequence[here], located.epoch[here])
        assert np.array_equal(found, start + np.flatnonzero(here))
    assert order.position_of(2, [0], 10**7).tolist() == [-1]


def test_positions_and_sequences_beyond_32_bits() -> None:
    huge = Order(0, [OrderSource("web", 10_000_000_000, 9), OrderSource("all", LARGEST, 1)])
    for start in (0, 1 << 33, (1 << 50) + 12_345):
        located = huge.locate(start, 5000)
        web, everything = located.source == 0, located.source == 1
        assert located.sequence.dtype == np.int64
        assert located.sequence[web].max() > 1 << 32
        assert located.sequence[everything].max() > 1 << 60
        assert located.epoch[web].min() == start * 58982 // 65536 // 10_000_000_000
        assert np.array_equal(
            huge.position_of(0, located.sequence[web], located.epoch[web]), start + np.flatnonzero(web)
        )
    assert len(np.unique(huge.locate(1 << 33, 5000).sequence)) == 5000


def test_golden_vectors() -> None:
    """The order of every run ever made hangs on these numbers: a change needs a new ORDER_VERSION."""
    located = Order(42, SMALL).locate(0, 12)
    assert located.source.tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 2, 0, 1, 2]
    assert located.epoch.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert located.sequence.tolist() == [494, 955, 2, 4, 577, 6, 561, 664, 0, 662, 3, 0]


def test_needed_and_the_epoch_check() -> None:
    order = Order(0, [OrderSource("code", 1000, 3), OrderSource("docs", 7, 1)])
    end = 400
    assert order.needed(end).sum() == end
    order.check_epochs(end, {"code": 1, "docs": None})
    order.check_epochs(end, {})
    with pytest.raises(UserError) as refusal:
        order.check_epochs(end, {"code": 1, "docs": 2})
    located = order.locate(0, end)
    position = int(np.flatnonzero((located.source == 1) & (located.epoch == 2))[0])
    needed = int(order.needed(end)[1])
    message = str(refusal.value)
    assert f"source 'docs' runs out at position {position}: it has 7 sequences and may be read for 2 epochs" in message
    assert f"up to position 400 needs {needed} ({needed / 7:.2f} epochs)" in message
    assert "Allow more epochs (max_epochs), lower the weight, train for fewer tokens or add data." in message
    assert "'code'" not in message


def test_the_epoch_check_is_exact_at_the_last_sequence() -> None:
    order = Order(0, [OrderSource("only", 10)])
    order.check_epochs(10, {"only": 1})
    with pytest.raises(UserError, match=r"runs out at position 10: it has 10 sequences and may be read for 1 epoch,"):
        order.check_epochs(11, {"only": 1})


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([OrderSource("a", 5), OrderSource("a", 6)], "several sources are named 'a'. Give each its own name"),
        ([OrderSource("a", 0)], "source 'a' has 0 sequences; it needs at least one"),
        ([OrderSource("a", 5, -1)], "source 'a' has the weight -1"),
        ([], "no source has a positive weight"),
    ],
)
def test_sources_that_make_no_order_are_refused(sources: list[OrderSource], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Order(0, sources)


def test_identity_is_json_and_equal_orders_have_no_difference() -> None:
    phases = [Phase(100, {"code": 1, "docs": 0, "one": 1})]
    identity = Order(3, SMALL, phases).identity()
    assert json.loads(json.dumps(identity)) == identity
    assert identity["phases"][1] == {"start": 100, "counts": {"code": 32768, "docs": 0, "one": 32768}}
    assert difference(identity, Order(3, SMALL, phases).identity()) == ""
    scaled = [OrderSource(source.name, source.sequences, source.weight * 8) for source in SMALL]
    assert difference(identity, Order(3, scaled, phases).identity()) == ""


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (Order(4, SMALL), "the seed was 3 and is now 4"),
        (Order(3, SMALL[:2]), "source 'one' is gone"),
        (Order(3, [*SMALL, OrderSource("new", 5)]), "source 'new' is new"),
        (
            Order(3, [OrderSource("code", 999, 3), *SMALL[1:]]),
            "source 'code' had 1000 sequences and now has 999",
        ),
        (
            Order(3, SMALL[::-1]),
            "the sources stood in the order code, docs, one and now stand in one, docs, code",
        ),
        (
            Order(3, SMALL, [Phase(64, {"code": 1, "docs": 1, "one": 1})]),
            "the mixture's phases started at positions [0] and now start at [0, 64]",
        ),
        (
            Order(3, [OrderSource("code", 1000, 1), *SMALL[1:]]),
            "the share of source 'code' from position 0 on was 43691/65536 and is now 26215/65536; the share of source "
            "'docs' from position 0 on was 14563/65536 and is now 26214/65536; the share of source 'one' from position "
            "0 on was 7282/65536 and is now 13107/65536",
        ),
    ],
)
def test_a_changed_order_is_told_in_words(changed: Order, words: str) -> None:
    assert difference(Order(3, SMALL).identity(), changed.identity()) == words


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("order_version", 99, "the version of the order was 1 and is now 99"),
        ("mode", "windowed", "the order's mode was full and is now windowed"),
        ("mixture_block", 1024, "the length of a mixture block was 65536 and is now 1024"),
    ],
)
def test_an_order_of_another_version_is_told_in_words(key: str, value: Any, words: str) -> None:
    identity = Order(3, SMALL).identity()
    other = copy.deepcopy(identity)
    other[key] = value
    assert difference(identity, other) == words
