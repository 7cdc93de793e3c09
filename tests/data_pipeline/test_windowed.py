"""The order ``windowed``: coverage, the inverse, windows entered once, epochs by stratum, independence, golden values.

What holds in both modes alike (chunks, schedules of ranks and batches, dtypes, cost) is in test_order_modes.py.
"""

from __future__ import annotations

import bisect
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from data_pipeline.mixture import Phase
from data_pipeline.order import Order, OrderSource, difference
from data_pipeline.permutation import LARGEST
from data_pipeline.windows import Windows

SOURCES = [OrderSource("code", 2003, 3), OrderSource("web", 1100, 1), OrderSource("tiny", 37, 0.3)]
PHASES = [Phase(5003, {"code": 1, "web": 2, "tiny": 0.1})]


def windowed(strata: int, window: int, seed: int = 3) -> Order:
    return Order(seed, SOURCES, PHASES, "windowed", Windows(strata, window))


@settings(max_examples=25, deadline=None)
@given(
    strata=st.integers(1, 40),
    window=st.integers(1, 300),
    size=st.integers(1, 3000),
    seed=st.integers(0, 1 << 63),
)
@example(strata=16, window=10, size=1024, seed=0)  # just cut
@example(strata=16, window=10, size=1023, seed=0)  # just not cut
@example(strata=40, window=10, size=7, seed=0)  # fewer sequences than strata
@example(strata=7, window=1, size=2999, seed=1)  # strata of different sizes, windows of one sequence
def test_every_epoch_of_every_stratum_holds_each_sequence_once(strata: int, window: int, size: int, seed: int) -> None:
    order = Order(seed, [OrderSource("a", size), OrderSource("b", 90, 2)], (), "windowed", Windows(strata, window))
    located = order.locate(0, 8 * size + 100)
    here = np.flatnonzero(located.source == 0)
    cut = size // strata >= 64
    groups = [here[here % strata == slot] for slot in range(strata)] if cut else [here]
    bounds = [i * size // strata for i in range(strata + 1)] if cut else [0, size]
    read = []
    for mine in groups:
        epochs, sequences = located.epoch[mine], located.sequence[mine]
        stratum = bisect.bisect_right(bounds, sequences[0]) - 1
        expected = range(bounds[stratum], bounds[stratum + 1])
        assert epochs.tolist() == [draw // len(expected) for draw in range(len(epochs))]
        for epoch in range(epochs[-1]):
            assert sorted(sequences[epochs == epoch].tolist()) == list(expected)
        read.append(stratum)
    assert sorted(read) == list(range(len(bounds) - 1))


@pytest.mark.parametrize(("strata", "window"), [(1, 50), (4, 10), (16, 7), (8, 1000), (8, 1)])
def test_the_inverse_finds_every_position(strata: int, window: int) -> None:
    order = windowed(strata, window)
    for start in (0, 4990, 1_000_003):
        located = order.locate(start, 3000)
        for source in range(3):
            here = located.source == source
            found = order.position_of(source, located.sequence[here], located.epoch[here])
            assert np.array_equal(found, start + np.flatnonzero(here))
    assert order.position_of(0, [0, 0], [1 << 40, -1]).tolist()[1] == -1
    stopped = Order(3, SOURCES, [Phase(500, {"code": 1, "web": 0, "tiny": 0})], "windowed", Windows(strata, window))
    assert stopped.position_of(1, [0, 5], 7).tolist() == [-1, -1]


@pytest.mark.parametrize("ratio", ["one row a step", "several rows a step"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_window_is_entered_once_an_epoch_and_by_one_rank(ranks: int, ratio: str) -> None:
    """With K | G and W b | K; the windows of a rank in use at a time are as many as it has slots and sources."""
    strata, micro_batch = 64, 64 // 8
    global_batch = strata if ratio == "one row a step" else 3 * strata
    order = Order(0, [OrderSource("a", 9000, 2), OrderSource("b", 7001, 1)], (), "windowed", Windows(strata, 32))
    steps = 45_000 // global_batch
    position = np.arange(steps * global_batch)
    rank = position % (ranks * micro_batch) // micro_batch
    located = order.locate(0, len(position))
    for source in (0, 1):
        entered: Counter[tuple[int, int, int]] = Counter()
        for owner in range(ranks):
            mine = (located.source == source) & (rank == owner)
            slot = position[mine] % strata
            first, _ = order.window(source, located.sequence[mine])
            for one in np.unique(slot):
                visits = np.stack([located.epoch[mine][slot == one], first[slot == one]], axis=1)
                changed = np.flatnonzero(np.any(np.diff(visits, axis=0) != 0, axis=1)) + 1
                entered.update((source, *visits[at].tolist()) for at in (0, *changed))
        assert set(entered.values()) == {1}
        finished = located.epoch[located.source == source].max() - 1
        assert finished >= 1
        size = order.sources[source].sequences
        windows = len(np.unique(order.window(source, np.arange(size))[0]))
        assert sum(epoch < finished for _, epoch, _ in entered) == finished * windows


def test_another_division_over_ranks_costs_reads_and_changes_no_position() -> None:
    """With W b not dividing K, slots change ranks: more entries into windows, the same order."""
    order = Order(0, [OrderSource("a", 9000)], (), "windowed", Windows(60, 32))
    located = order.locate(0, 9000)
    first, _ = order.window(0, located.sequence)
    position = np.arange(9000)

    def entries(per_rank: int, ranks: int) -> int:
        owner = position % (per_rank * ranks) // per_rank
        pairs = {(int(r), int(w), int(e)) for r, w, e in zip(owner, first, located.epoch, strict=True)}
        return len(pairs)

    windows = entries(15, 4)
    assert windows == entries(60, 1)
    assert windows < entries(16, 4) <= 4 * windows


def test_windows_are_visited_in_another_order_each_epoch_but_for_the_ends_of_a_stratum() -> None:
    order = Order(0, [OrderSource("a", 20_050)], (), "windowed", Windows(1, 100))
    located = order.locate(0, 3 * 20_050)
    first, stop = order.window(0, located.sequence)
    visits = [list(dict.fromkeys(first[located.epoch == epoch].tolist())) for epoch in range(3)]
    assert sorted(visits[0]) == sorted(visits[1]) == sorted(visits[2])
    assert visits[0] != visits[1] != visits[2] != visits[0]
    assert {one[-1] for one in visits} == {20_000}, "what is left over comes last"
    assert (stop - first).max() == 100
    inside = located.sequence[(first == 500) & (located.epoch == 0)]
    again = located.sequence[(first == 500) & (located.epoch == 1)]
    assert sorted(inside.tolist()) == sorted(again.tolist()) == list(range(500, 600))
    assert inside.tolist() != again.tolist() != list(range(500, 600))


def test_strata_windows_and_sources_are_shuffled_apart() -> None:
    """No two of the permutations in use are equal: keys hang on source, epoch, stratum and window."""
    order = Order(0, [OrderSource("a", 32_000), OrderSource("b", 32_000)], (), "windowed", Windows(8, 40))
    located = order.locate(0, 3 * 64_000)
    seen: Counter[tuple[int, ...]] = Counter()
    for source in (0, 1):
        for slot in range(8):
            mine = np.flatnonzero(located.source == source)
            mine = mine[mine % 8 == slot]
            first, stop = order.window(source, located.sequence[mine])
            for epoch in (0, 1):
                for window in np.unique(first[stop - first == 40]).tolist():
                    here = (first == window) & (located.epoch[mine] == epoch)
                    seen[tuple((located.sequence[mine][here] - window).tolist())] += 1
    assert len(seen) > 2500
    assert max(seen.values()) == 1


def test_adding_or_reweighing_sources_leaves_the_samples_of_every_stratum_in_order() -> None:
    windows = Windows(8, 20)
    few = Order(5, SOURCES[:2], (), "windowed", windows)
    more = Order(
        5,
        [OrderSource("new", 5000, 2), SOURCES[1], OrderSource("code", 2003, 0.4)],
        [Phase(77, {"new": 1, "web": 1, "code": 9})],
        "windowed",
        windows,
    )
    for name in ("code", "web"):
        for slot in range(8):
            drawn = []
            for order in (few, more):
                located = order.locate(0, 30_000)
                here = np.flatnonzero(located.source == [source.name for source in order.sources].index(name))
                here = here[here % 8 == slot]
                drawn.append(list(zip(located.epoch[here].tolist(), located.sequence[here].tolist(), strict=True)))
            shared = min(map(len, drawn))
            assert shared > 150
            assert drawn[0][:shared] == drawn[1][:shared]


def test_a_source_too_small_to_be_cut_is_read_epoch_after_epoch_as_in_full() -> None:
    order = windowed(8, 20)
    full = Order(3, SOURCES)
    for source, name in ((2, "tiny"),):
        here, there = order.locate(0, 20_000), full.locate(0, 20_000)
        mine, other = here.source == source, there.source == source
        shared = min(mine.sum(), other.sum())
        assert shared > 400, name
        assert np.array_equal(here.epoch[mine][:shared], there.epoch[other][:shared])
        assert np.array_equal(here.sequence[mine][:shared], there.sequence[other][:shared])
        assert order.window(source, [0, 36])[0].tolist() == [0, 0]
        assert order.window(source, [0, 36])[1].tolist() == [37, 37]


def test_needed_and_the_epoch_check_are_exact_for_every_stratum() -> None:
    order = windowed(8, 20)
    located = order.locate(0, 40_000)
    for end in (0, 1, 5003, 17_777):
        assert order.needed(end).tolist() == np.bincount(located.source[:end], minlength=3).tolist()
    for source, name in enumerate(("code", "web", "tiny")):
        for epochs in (1, 2, 3):
            position = int(np.flatnonzero((located.source == source) & (located.epoch == epochs))[0])
            order.check_epochs(position, {name: epochs})
            for end in (position + 1, 39_000):
                with pytest.raises(UserError, match=f"'{name}' runs out at position {position}: it has"):
                    order.check_epochs(end, {name: epochs})
    order.check_epochs(1 << 40, {"code": LARGEST, "web": None})


def test_a_stratum_that_ends_before_the_others_is_told() -> None:
    order = Order(0, [OrderSource("a", 1003, 1), OrderSource("b", 5000, 1)], (), "windowed", Windows(8, 20))
    located = order.locate(0, 5000)
    first_repeat = int(np.flatnonzero((located.source == 0) & (located.epoch == 1))[0])
    drawn = int((located.source[: first_repeat + 1] == 0).sum())
    assert drawn <= 1003
    with pytest.raises(UserError) as refusal:
        order.check_epochs(first_repeat + 1, {"a": 1})
    assert (
        f"source 'a' runs out at position {first_repeat}: it has 1003 sequences and may be read for 1 epoch, but the "
        f"run up to position {first_repeat + 1} needs {drawn} ({drawn / 1003:.2f} epochs), and the strata of the "
        "windowed order end a few draws before or after one another. Allow more epochs"
    ) in str(refusal.value)


def test_golden_vectors() -> None:
    """The order of every run ever made hangs on these numbers: a change needs a new ORDER_VERSION."""
    order = windowed(4, 10, seed=42)
    assert [column.tolist() for column in order.locate(0, 16)] == [
        [0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [55, 500, 1375, 830, 57, 506, 628, 1506, 51, 279, 1374, 1504, 108, 508, 1376, 1507],
    ]
    assert [column.tolist() for column in windowed(11, 10, seed=42).locate(1_000_000, 12)] == [
        [1, 1, 0, 1, 1, 2, 0, 1, 1, 0, 1, 1],
        [584, 584, 162, 584, 584, 876, 162, 584, 584, 162, 584, 584],
        [210, 429, 1267, 837, 1046, 24, 668, 558, 717, 1757, 15, 212],
    ]
    far = Order(7, [OrderSource("web", 10**10, 9), OrderSource("all", LARGEST, 1)], (), "windowed", Windows(1024, 1024))
    located = far.locate((1 << 50) + 12_345, 6)
    assert [column.tolist() for column in located] == [
        [0, 0, 0, 0, 0, 0],
        [101330, 101330, 101330, 101330, 101330, 101330],
        [2100637770, 6001931078, 9898682131, 3796645418, 7695037784, 1590179733],
    ]
    assert [column.tolist() for column in far.window(0, located.sequence[:3])] == [
        [2100637559, 6001931078, 9898681908],
        [2100638583, 6001932102, 9898682932],
    ]


def test_identity_and_difference_name_strata_and_windows() -> None:
    order = windowed(1000, 20)
    identity = order.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert (identity["mode"], identity["strata"], identity["window_sequences"]) == ("windowed", 1000, 20)
    assert identity["mixture_block"] == 66_000
    assert sum(identity["phases"][0]["counts"].values()) == 66_000
    assert difference(identity, windowed(1000, 20).identity()) == ""
    assert difference(identity, windowed(1000, 30).identity()) == (
        "the number of sequences in a window was 20 and is now 30"
    )
    assert difference(identity, windowed(1024, 20).identity()) == (
        "the number of strata was 1000 and is now 1024; the length of a mixture block was 66000 and is now 65536"
    )
    assert difference(identity, Order(3, SOURCES, PHASES).identity()) == (
        "the order's mode was windowed and is now full; the length of a mixture block was 66000 and is now 65536"
    )
    reweighed = Order(3, [OrderSource("code", 2003, 1), *SOURCES[1:]], PHASES, "windowed", Windows(1000, 20))
    assert "the share of source 'code' from position 0 on was 46046/66000 and is now 28696/66000" in difference(
        identity, reweighed.identity()
    )


def test_windows_belong_to_the_windowed_order() -> None:
    with pytest.raises(UserError, match=r"the order 'full' has no windows\. Give windows with the order 'windowed'"):
        Order(0, SOURCES, (), "full", Windows(4, 4))
    with pytest.raises(UserError, match="the order 'windowed' needs the size and number of its windows"):
        Order(0, SOURCES, (), "windowed")


@pytest.mark.parametrize("order", [Order(3, SOURCES), windowed(8, 20)])
def test_sequences_that_a_source_has_not_are_refused(order: Order) -> None:
    with pytest.raises(ValueError, match="source 'web' has 1100 sequences, none of number 1100"):
        order.position_of(1, [0, 1100], 0)
    with pytest.raises(ValueError, match="none of number -1"):
        order.window(1, [-1])
    with pytest.raises(ValueError, match="positions start at 0"):
        order.locate(-1, 5)
