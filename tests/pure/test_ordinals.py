"""Counting messages by tag: as a dictionary would, in memory that does not grow with every tag."""

import sys
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfold.comm import ordinals
from ringfold.comm.ordinals import Ordinals

TAGS = st.one_of(st.integers(0, 40), st.integers(0, 2**31 - 1))


@settings(max_examples=300)
@given(st.lists(TAGS, max_size=300), st.integers(1, 9))
def test_it_counts_as_a_dictionary(tags: list[int], recent: int) -> None:
    counted, known = Ordinals(), ordinals._RECENT
    expected: Counter[int] = Counter()
    try:
        ordinals._RECENT = recent
        for tag in tags:
            expected[tag] += 1
            assert counted.next(tag) == expected[tag]
        runs = list(zip(counted._starts, counted._stops, counted._counts, strict=True))
        assert all(start < stop and count > 0 for start, stop, count in runs)
        assert all(a[1] < b[0] or (a[1] == b[0] and a[2] != b[2]) for a, b in pairwise(runs))
    finally:
        ordinals._RECENT = known


def test_the_last_message_of_a_tag_is_taken_back() -> None:
    counted = Ordinals()
    assert [counted.next(7) for _ in range(3)] == [1, 2, 3]
    assert counted.take_back(7, 3) and counted.take_back(7, 3) and counted.next(7) == 3
    assert not counted.take_back(7, 2) and counted.next(7) == 4
    counted._settle()
    assert counted.take_back(7, 4) and counted.next(7) == 4
    assert counted.take_back(8, 1) and counted.next(8) == 1


@pytest.mark.parametrize(("stride", "each"), [(1, 0), (1000, 40)])
def test_tags_that_number_steps_take_little_memory(stride: int, each: int) -> None:
    """A dictionary of them takes 265 bytes for each."""
    counted, steps = Ordinals(), 100_000
    for step in range(steps):
        assert counted.next(step * stride) == 1
    assert counted.next(0) == counted.next(step * stride) == 2
    runs = counted._starts.nbytes + counted._stops.nbytes + counted._counts.nbytes
    assert runs + sys.getsizeof(counted._places) + counted._words.nbytes < each * steps + 100_000
