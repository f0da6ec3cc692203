"""Stages are contiguous, complete, never empty, and the largest is as small as it can be."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfold.parallel.partition import balance, cut


def sums(costs, stages):
    return [sum(costs[i] for i in stage) for stage in stages]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(1, 4))
def test_balance_is_optimal_by_exhaustion(costs, num_stages):
    if len(costs) < num_stages:
        with pytest.raises(ValueError, match="without layers"):
            balance(costs, num_stages)
        return
    stages = balance(costs, num_stages)
    assert [i for stage in stages for i in stage] == list(range(len(costs)))
    assert all(len(stage) > 0 for stage in stages)
    every = [
        sums(costs, cut(len(costs), num_stages, edges))
        for edges in combinations(range(1, len(costs)), num_stages - 1)
    ]
    best = min((max(s), sum(x * x for x in s)) for s in every)
    found = sums(costs, stages)
    assert (max(found), sum(x * x for x in found)) == best


@given(st.data())
def test_costs_that_differ_by_stage_are_optimal_by_exhaustion(data):
    num_stages = data.draw(st.integers(1, 4))
    num_layers = data.draw(st.integers(num_stages, 7))
    row = st.lists(st.integers(0, 20), min_size=num_layers, max_size=num_layers)
    costs = data.draw(st.lists(row, min_size=num_stages, max_size=num_stages))

    def each(stages):
        return [sum(costs[s][i] for i in stage) for s, stage in enumerate(stages)]

    every = [
        each(cut(num_layers, num_stages, edges))
        for edges in combinations(range(1, num_layers), num_stages - 1)
    ]
    found = each(balance(costs, num_stages))
    assert (max(found), sum(x * x for x in found)) == min(
        (max(s), sum(x * x for x in s)) for s in every
    )


def test_an_early_stage_that_holds_more_gets_fewer_layers():
    row = [1.0] * 6
    assert [len(s) for s in balance([[2 * c for c in row], row], 2)] == [2, 4]
    with pytest.raises(ValueError, match="costs for 3 stages, got 2 rows"):
        balance([row, row], 3)


def test_equal_layers():
    assert balance([1] * 8, 4) == (range(0, 2), range(2, 4), range(4, 6), range(6, 8))


def test_one_heavy_layer_leaves_the_rest_even():
    assert sums([1, 1, 1, 1, 10], balance([1, 1, 1, 1, 10], 3)) == [2, 2, 10]


def test_layers_without_parameters():
    assert balance([5, 0, 5], 3) == (range(0, 1), range(1, 2), range(2, 3))
    assert [len(stage) for stage in balance([0, 0, 0, 0], 4)] == [1, 1, 1, 1]


def test_cut_by_given_boundaries():
    assert cut(5, 3, [2, 3]) == (range(0, 2), range(2, 3), range(3, 5))
    assert cut(4, 1, []) == (range(0, 4),)


@pytest.mark.parametrize(
    ("boundaries", "stage"), [([0, 3], 0), ([2, 2], 1), ([3, 5], 2), ([4, 2], 1), ([2, 9], 2)]
)
def test_empty_stage_is_named(boundaries, stage):
    with pytest.raises(ValueError, match=f"stage {stage} of 3 is left without layers"):
        cut(5, 3, boundaries)


def test_wrong_number_of_boundaries():
    with pytest.raises(ValueError, match=r"expected 2 boundaries for 3 stages, got \[1\]"):
        cut(5, 3, [1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1])
def test_bad_costs(bad):
    with pytest.raises(ValueError, match="finite costs"):
        balance([1, bad], 2)


def test_fewer_layers_than_stages_names_the_first_empty_stage():
    with pytest.raises(ValueError, match="stage 2 of 4 is left without layers"):
        balance([1, 1], 4)
