"""Clocks, sets of moments, and what a trace says of them, each on an example worked by hand."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfold.comm.algorithms import BUILDERS
from ringfold.comm.clock import Offset, between, cristian
from ringfold.comm.intervals import common, length, union, without
from ringfold.comm.program import Op, lower, part_of
from ringfold.comm.trace_file import RankTrace, document, events, summarize, table, wire_bytes

INTERVALS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted).map(tuple))


def moments(intervals):
    return {m for start, end in intervals for m in range(start, end)}


@given(INTERVALS, INTERVALS)
def test_intervals_are_sets_of_moments(first, second):
    a, b = union(first), union(second)
    assert moments(a) == moments(first)
    assert length(a) == len(moments(first))
    assert all(left[1] < right[0] for left, right in pairwise(a))
    assert moments(common(a, b)) == moments(a) & moments(b)
    assert moments(without(a, b)) == moments(a) - moments(b)


def test_the_shortest_trip_tells_the_offset():
    # Sent at 100 and back at 120: the remote clock showed 1110 at 110, give or take 10.
    found = cristian([(0, 1090, 100), (100, 1110, 120), (200, 1280, 290)])
    assert found == Offset(1000.0, 10.0, 1110)


def test_a_drifting_clock_is_followed_between_two_offsets():
    first, last = Offset(10.0, 1.0, 1000), Offset(30.0, 1.0, 2000)
    assert [between(first, last, at) for at in (1000, 1500, 2000)] == [10.0, 20.0, 30.0]
    assert between(first, first, 5) == 10.0


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(
    "name",
    [
        ("allreduce", "ring"),
        ("reduce_scatter", "ring"),
        ("allgather", "ring"),
        ("broadcast", "ring"),
        ("alltoall", "pairwise"),
        ("gather", "pairwise"),
        ("scatter", "pairwise"),
    ],
)
def test_wire_bytes_are_what_the_ranks_send_on_the_mean(name, size):
    operation = name[0]
    own = 7 * size * 4
    count = own * size if operation in ("allgather", "gather", "scatter") else own
    schedule = (
        BUILDERS[name](size, 0)
        if operation in ("broadcast", "gather", "scatter")
        else (BUILDERS[name](size))
    )
    sent = 0
    for rank in range(size):
        rows = lower(part_of(schedule, rank), count).rows
        sent += int(rows[rows[:, 1] == Op.SEND, 4].sum())
    if operation == "scatter":  # the root alone sends
        assert sent == wire_bytes(operation, count, size)
    else:
        assert sent / size == wire_bytes(operation, own, size)


def trace_of(rank, **changes):
    # One step of 100: compute 0-60 with packing 20-30 and a wait 40-50; an allreduce 25-80.
    values = dict(
        rank=rank,
        host="here",
        start=1000.0,
        end=1100.0,
        error=0.0,
        lost=0,
        spans=[
            ("step", "step 0", 1000.0, 1100.0),
            ("compute", "backward", 1000.0, 1060.0),
            ("pack", "bucket 0", 1020.0, 1030.0),
            ("wait", "allreduce", 1040.0, 1050.0),
            ("wait", "allreduce", 1060.0, 1080.0),
        ],
        operations=[
            ("allreduce", "bucket 0", "...", 1025.0 + rank, 1080.0, 4000.0, "world", 1, 2),
            ("recv", "", "...", 1000.0, 1100.0, 0.0, "world", 1, 2),
        ],
    )
    return RankTrace(**{**values, **changes})


def test_a_summary_adds_up():
    first, second = summarize([trace_of(0), trace_of(1)])
    assert (first.seconds, first.compute, first.pack, first.wait) == (100, 40, 10, 30)
    assert (first.communication, first.hidden, first.exposed) == (55, 25, 30)
    assert first.wire_bytes == 4000.0
    assert first.busbw == pytest.approx(4000 / 55e-6)
    assert first.bubble == pytest.approx(0.5)
    assert (first.last, second.last, second.behind) == (0, 1, 1.0)


def test_no_step_no_bubble_and_half_seen_collectives_name_no_straggler():
    quiet = trace_of(0, spans=[], operations=[])
    alone = trace_of(1, spans=[])
    first, second = summarize([quiet, alone])
    assert first.bubble is None and first.busbw == 0.0
    assert (first.last, second.last) == (0, 0)
    assert "-" in table([first])


def test_a_table_says_which_ranks_lack_operations():
    """Only the file told: the table showed too few bytes without a word."""
    assert table(summarize([trace_of(0), trace_of(1)])).count("\n") == 2
    last = table(summarize([trace_of(0), trace_of(1, lost=344)])).splitlines()[-1]
    assert last.startswith("operations that are not in here") and last.endswith(": rank 1 344")


def test_works_in_flight_together_get_lanes_of_their_own():
    operations = [
        (name, "", "", start, end, 0.0, "world", n, 2)
        for n, (name, start, end) in enumerate(
            [("barrier", 1000.0, 1010.0), ("reduce", 1005.0, 1020.0), ("gather", 1010.0, 1012.0)]
        )
    ]
    shown = [e for e in events([trace_of(0, operations=operations, spans=[])]) if e["ph"] == "X"]
    assert [(e["name"], e["tid"], e["ts"], e["dur"]) for e in shown] == [
        ("barrier", 1, 0.0, 10.0),
        ("reduce", 2, 5.0, 15.0),
        ("gather", 1, 10.0, 2.0),
    ]


def test_the_file_is_json_with_one_process_per_rank():
    found = json.loads(document([trace_of(0), trace_of(1, error=2.5)]))
    assert {event["pid"] for event in found["traceEvents"]} == {0, 1}
    assert found["otherData"]["clock_error_us"] == 2.5
    assert np.isclose(found["otherData"]["summary"][1]["exposed"], 30)
