"""The mixture against a slow reference, its exact ratios, its bound on prefixes, phases and the inverse."""

from __future__ import annotations

import math
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from data_pipeline.mixture import MIXTURE_BLOCK, Mixture, Phase, quantise_weights
from data_pipeline.permutation import derive_keys, mix64

M = MIXTURE_BLOCK
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


def one_phase(weights: dict[str, float], seed: int = 7) -> Mixture:
    return Mixture(seed, [Phase(0, weights)])


def ordinals_of(mixture: Mixture, start: int, count: int) -> list[list[int]]:
    source, ordinal = mixture.locate(start, count)
    return [ordinal[source == s].tolist() for s in range(len(mixture.names))]


def reference_block(names: list[str], counts: list[int], seed: int, start: int) -> list[int]:
    """The source of each slot of the block at ``start``, from exact fractions and Python's stable sort."""
    items = []
    for number, (name, count) in enumerate(zip(names, counts, strict=True)):
        key = int(derive_keys(seed, "mixture", name, start)[0])
        for k in range(count):
            jitter = int(mix64(np.array([(k + key) % 2**64], np.uint64))[0]) >> 32
            items.append((math.floor(Fraction((k << 32) + jitter, count)), number))
    return [number for _, number in sorted(items)]


@pytest.mark.parametrize(
    "block", [0, 5, 59]
)  # two items of blocks 5 and 59 have equal keys: the lower source comes first
def test_a_block_is_the_stratified_interleave_of_its_definition(block: int) -> None:
    mixture = one_phase(WEIGHTS)
    counts = mixture.spans[0][1].tolist()
    source, _ = mixture.locate(block * M, M)
    assert source.tolist() == reference_block(list(WEIGHTS), counts, 7, block * M)


def test_golden_vectors() -> None:
    """The order of every run ever made hangs on these numbers: a change needs a new ORDER_VERSION."""
    source, ordinal = one_phase(WEIGHTS).locate(0, 20)
    assert source.tolist() == [0, 1, 0, 2, 0, 1, 2, 0, 1, 0, 0, 2, 0, 1, 0, 1, 2, 0, 0, 1]
    assert ordinal.tolist() == [0, 0, 1, 0, 2, 1, 1, 3, 2, 4, 5, 2, 6, 3, 7, 4, 3, 8, 9, 5]
    source, ordinal = one_phase(WEIGHTS).locate(65530, 12)
    assert source.tolist() == [0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1]
    assert ordinal.tolist() == [32765, 19659, 32766, 13106, 32767, 19660, 32768, 19661, 32769, 13107, 32770, 19662]


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ({"a": 1}, [M]),
        ({"a": 3, "b": 1}, [49152, 16384]),
        ({"a": 1, "b": 1, "c": 1}, [21846, 21845, 21845]),
        ({"a": 0, "b": 2.5}, [0, M]),
        ({"a": 1e-5, "b": 1}, [1, 65535]),
        ({"a": 1e300, "b": 1e300}, [32768, 32768]),
        ({f"s{i}": 1 for i in range(M)}, [1] * M),
    ],
)
def test_weights_become_counts_by_largest_remainder(weights: dict[str, float], counts: list[int]) -> None:
    assert quantise_weights(weights).tolist() == counts


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1, "rare": 1e-6}, r"source 'rare' has 1\.00e-06 of the total weight.*at least 1\.53e-05 or set it to 0"),
        ({"a": 1, "b": -0.5}, r"source 'b' has the weight -0\.5"),
        ({"a": math.nan}, r"source 'a' has the weight nan"),
        ({"a": math.inf, "b": 1}, r"source 'a' has the weight inf"),
        ({"a": 0.0, "b": 0}, r"no source has a positive weight \(sources: a, b\)"),
        ({}, r"no source has a positive weight \(sources: none\)"),
        ({f"s{i}": 1 for i in range(M + 1)}, r"source 's65536' has 1\.53e-05 of the total"),
    ],
)
def test_weights_that_cannot_be_kept_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        quantise_weights(weights)


def test_every_block_holds_the_exact_counts_and_ordinals_increase_without_a_gap() -> None:
    mixture = one_phase({"a": 1, "b": 1e-4, "none": 0, "c": 0.7})
    counts = mixture.spans[0][1]
    for block in (0, 1, 2, 1000, 1 << 40):
        source, ordinal = mixture.locate(block * M, M)
        assert np.bincount(source, minlength=4).tolist() == counts.tolist()
        for number, count in enumerate(counts.tolist()):
            expected = block * count + np.arange(count)
            assert np.array_equal(ordinal[source == number], expected)


@settings(max_examples=25, deadline=None)
@given(weights=st.lists(st.floats(0.001, 1), min_size=1, max_size=12), seed=st.integers(0, 1 << 32))
def test_a_prefix_is_as_close_to_the_ratio_as_the_module_says(weights: list[float], seed: int) -> None:
    mixture = one_phase({f"s{i}": weight for i, weight in enumerate(weights)}, seed)
    source, _ = mixture.locate(0, M)
    lengths = np.arange(1, M + 1)
    for number, count in enumerate(mixture.spans[0][1].tolist()):
        drawn = np.cumsum(source == number)
        bound = 1 + count / M * (len(weights) - 2) + 1e-4  # keys have 32 bits, so a share is known to 2^-32 of a block
        assert np.abs(drawn - lengths * count / M).max() <= bound


def test_many_sources_are_all_drawn() -> None:
    mixture = one_phase({f"s{i}": 1 + i % 7 for i in range(5000)})
    source, _ = mixture.locate(0, M)
    assert np.array_equal(np.bincount(source), mixture.spans[0][1])
    assert len(np.unique(source[:23_000])) == 5000  # the rarest hold 3 slots, the first of them in the first third


def test_blocks_seeds_and_phases_are_jittered_apart() -> None:
    blocks = [one_phase(WEIGHTS).locate(block * M, M)[0] for block in (0, 1)]
    blocks.append(one_phase(WEIGHTS, seed=8).locate(0, M)[0])
    blocks.append(Mixture(7, [Phase(0, WEIGHTS), Phase(1000, WEIGHTS)]).locate(1000, M)[0])
    for i, one in enumerate(blocks):
        assert all(not np.array_equal(one, other) for other in blocks[:i])


PHASES = [
    Phase(0, {"a": 1, "b": 1, "c": 0}),
    Phase(100, {"a": 0, "b": 1, "c": 3}),
    Phase(100 + M + 37, {"a": 5, "b": 0, "c": 3}),
    Phase(3 * M, {"a": 1, "b": 1, "c": 1}),
]


def test_ordinals_go_on_over_phases_exactly() -> None:
    mixture = Mixture(3, PHASES)
    source, ordinal = mixture.locate(0, 5 * M)
    for number in range(3):
        assert np.array_equal(ordinal[source == number], np.arange((source == number).sum()))
    # a phase that begins inside a block of the one before counts its own blocks from its start
    second = source[100 : 100 + M]
    assert np.bincount(second, minlength=3).tolist() == [0, M // 4, 3 * M // 4]
    assert np.array_equal(source[:100], one_phase(dict(PHASES[0].weights), 3).locate(0, 100)[0])


@settings(max_examples=60, deadline=None)
@given(start=st.integers(0, 4 * M), lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=6))
def test_chunks_over_block_and_phase_edges_equal_one_call(start: int, lengths: list[int]) -> None:
    mixture = Mixture(3, PHASES)
    whole = mixture.locate(start, sum(lengths))
    starts = start + np.cumsum([0, *lengths[:-1]])
    parts = [mixture.locate(int(at), length) for at, length in zip(starts, lengths, strict=True)]
    for column in range(2):
        assert np.array_equal(whole[column], np.concatenate([part[column] for part in parts]))


def test_chunks_equal_one_by_one_across_a_phase_change() -> None:
    mixture = Mixture(3, PHASES)
    source, ordinal = mixture.locate(60, 100)
    ones = [mixture.locate(60 + i, 1) for i in range(100)]
    assert [(int(s[0]), int(o[0])) for s, o in ones] == list(zip(source.tolist(), ordinal.tolist(), strict=True))


@pytest.mark.parametrize("start", [0, 50, M - 20, 100 + M, 100 + M + 30, 3 * M - 500, 7 * M + 123, (1 << 50) + 5])
def test_the_inverse_finds_every_position(start: int) -> None:
    mixture = Mixture(3, PHASES)
    source, ordinal = mixture.locate(start, 1000)
    for number in range(3):
        here = source == number
        assert np.array_equal(mixture.position_of(number, ordinal[here]), start + np.flatnonzero(here))


def test_an_ordinal_that_is_never_drawn_has_no_position() -> None:
    mixture = Mixture(3, [Phase(0, {"a": 1, "b": 1}), Phase(10, {"a": 1, "b": 0})])
    drawn = int(mixture.needed(10)[1])
    assert mixture.position_of(1, np.array([drawn - 1, drawn, 10**12, -1])).tolist()[1:] == [-1, -1, -1]
    assert mixture.position_of(0, np.array([-1])).tolist() == [-1]
    assert 0 <= mixture.position_of(1, np.array([drawn - 1]))[0] < 10


@settings(max_examples=60, deadline=None)
@given(end=st.integers(0, 5 * M))
def test_needed_counts_what_is_drawn_before_the_end(end: int) -> None:
    mixture = Mixture(3, PHASES)
    source, _ = mixture.locate(0, end)
    assert mixture.needed(end).tolist() == np.bincount(source, minlength=3).tolist()


def test_a_short_prefix_of_a_source_is_its_first_ordinals() -> None:
    """A run much shorter than a block must still consume a source from its beginning."""
    for ordinals in ordinals_of(one_phase(WEIGHTS), 0, 50):
        assert ordinals == list(range(len(ordinals)))


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], "first phase of a mixture starts at position 0"),
        ([Phase(5, WEIGHTS)], "first phase of a mixture starts at position 0"),
        ([Phase(0, WEIGHTS), Phase(9, {"a": 1})], r"starts at position 9 gives no weight to \['b', 'c'\]"),
        ([Phase(0, WEIGHTS), Phase(9, {**WEIGHTS, "d": 1})], r"names \['d'\], which is no source"),
        ([Phase(0, WEIGHTS), Phase(9, WEIGHTS), Phase(9, WEIGHTS)], "position 9 follows one that starts at 9"),
    ],
)
def test_phases_that_make_no_mixture_are_refused(phases: list[Phase], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mixture(0, phases)


def test_cost_of_a_seek_and_of_a_chunk() -> None:
    """Measured at about 5 ms for entering a block anywhere and 0.01 us per position in it."""
    mixture = one_phase(WEIGHTS)
    began = time.perf_counter()
    mixture.locate((1 << 50) + 17, 1)
    entered = time.perf_counter()
    for _ in range(50):
        mixture.locate((1 << 50) + 17, 1024)
    assert entered - began < 0.25
    assert (time.perf_counter() - entered) / (50 * 1024) < 5e-6
