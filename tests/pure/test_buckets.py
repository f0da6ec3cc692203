"""Buckets hold every tensor once, one dtype each, in the order in which they become full."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfold.parallel.buckets import (
    LIMITS,
    Bucket,
    Member,
    Pace,
    choose_limit,
    finish_time,
    plan_buckets,
)

ITEMSIZE = {"float32": 4, "float64": 8, "bfloat16": 2}


def member(count, dtype="float32", name="w"):
    return Member(name, count, dtype, ITEMSIZE[dtype])


def numbered(*members):
    return dict(enumerate(members))


def test_reverse_order_and_limit():
    buckets = plan_buckets(numbered(member(1), member(2), member(3)), limit_bytes=20)
    assert buckets == (
        Bucket((2, 1), (0, 3), (3, 2), 5, "float32"),
        Bucket((0,), (0,), (1,), 1, "float32"),
    )


def test_given_order():
    buckets = plan_buckets(
        numbered(member(1), member(2), member(3)), limit_bytes=12, order=[0, 1, 2]
    )
    assert [bucket.indices for bucket in buckets] == [(0, 1), (2,)]


def test_keys_may_leave_numbers_out():
    buckets = plan_buckets({7: member(1), 3: member(2), 9: member(3)}, limit_bytes=20)
    assert [bucket.indices for bucket in buckets] == [(9, 7), (3,)]


def test_tensor_above_the_limit_is_alone():
    buckets = plan_buckets(numbered(member(1), member(100), member(1)), limit_bytes=16)
    assert [bucket.indices for bucket in buckets] == [(2,), (1,), (0,)]


def test_dtypes_do_not_mix_and_come_when_full():
    members = [member(1), member(1, "float64"), member(1), member(1, "float64"), member(1)]
    buckets = plan_buckets(numbered(*members), limit_bytes=16)
    assert [(bucket.dtype, bucket.indices) for bucket in buckets] == [
        ("float64", (3, 1)),
        ("float32", (4, 2, 0)),
    ]


def test_empty_tensors_and_no_tensors():
    assert plan_buckets({}, limit_bytes=1) == ()
    assert plan_buckets(numbered(member(0), member(0)), 1) == (
        Bucket((1, 0), (0, 0), (0, 0), 0, "float32"),
    )


@pytest.mark.parametrize("order", [[0], [0, 0], [0, 2], [0, 1, 2]])
def test_order_must_be_a_permutation(order):
    with pytest.raises(ValueError, match=r"expected an order of \[0, 1\]"):
        plan_buckets(numbered(member(1), member(1)), 8, order=order)


def test_limit_must_be_positive():
    with pytest.raises(ValueError, match="bucket bytes >= 1, got 0"):
        plan_buckets({0: member(1)}, 0)


MEMBERS = st.lists(st.builds(member, st.integers(0, 9), st.sampled_from(sorted(ITEMSIZE))))


@given(MEMBERS, st.integers(1, 64), st.randoms())
def test_every_tensor_once_within_the_limit(members, limit, random):
    order = list(range(len(members)))
    random.shuffle(order)
    buckets = plan_buckets(numbered(*members), limit, order)
    assert sorted(i for bucket in buckets for i in bucket.indices) == list(range(len(members)))
    rank_of = {index: place for place, index in enumerate(order)}
    filled_at = []
    for bucket in buckets:
        assert {members[i].dtype for i in bucket.indices} == {bucket.dtype}
        assert tuple(members[i].count for i in bucket.indices) == bucket.counts
        ends = [o + c for o, c in zip(bucket.offsets, bucket.counts, strict=True)]
        assert list(bucket.offsets) == [0, *ends[:-1]]
        assert bucket.count == ends[-1]
        nbytes = bucket.count * ITEMSIZE[bucket.dtype]
        nonzero = sum(count > 0 for count in bucket.counts)
        assert nbytes <= limit or nonzero == 1
        places = [rank_of[i] for i in bucket.indices]
        assert places == sorted(places)
        filled_at.append(places[-1])
    assert filled_at == sorted(filled_at)


def test_finish_time_by_hand():
    """Ready at 1 and 5; each takes 2 s and a second per byte, one after the other."""
    members = numbered(member(1), member(2))
    pace = Pace(latency=2.0, seconds_per_byte=0.5)
    apart = plan_buckets(members, 8, [0, 1])
    assert finish_time(apart, members, {0: 1.0, 1: 5.0}, pace) == 1 + (2 + 2) + (2 + 4)
    assert finish_time(apart, members, {0: 1.0, 1: 50.0}, pace) == 50 + 2 + 4
    together = plan_buckets(members, 12, [0, 1])
    assert finish_time(together, members, {0: 1.0, 1: 5.0}, pace) == 5 + 2 + 6
    assert finish_time((), {}, {}, pace) == 0.0


def test_limit_follows_latency_and_bandwidth():
    quarter = {place: member(1 << 14) for place in range(16)}  # 64 KiB each
    order, ready = range(16), {place: 0.001 * (place + 1) for place in range(16)}
    # Free latency: the smallest buckets hide most. No bandwidth cost: one bucket. In between, some.
    assert choose_limit(quarter, order, ready, Pace(0.0, 1e-9)) == LIMITS[0]
    assert choose_limit(quarter, order, ready, Pace(0.1, 0.0)) == LIMITS[-1]
    between = choose_limit(quarter, order, ready, Pace(0.002, 1e-8))
    assert LIMITS[0] < between < 16 << 16


@given(st.lists(st.integers(0, 1 << 16), max_size=8), st.floats(0, 1), st.floats(0, 1e-6))
def test_no_other_limit_ends_earlier(counts, latency, per_byte):
    members = {place: member(count) for place, count in enumerate(counts)}
    order, ready = range(len(members)), {place: 0.01 * place for place in members}
    pace = Pace(latency, per_byte)
    ends = [
        finish_time(plan_buckets(members, limit, order), members, ready, pace) for limit in LIMITS
    ]
    best = choose_limit(members, order, ready, pace)
    assert ends[LIMITS.index(best)] == min(ends)
