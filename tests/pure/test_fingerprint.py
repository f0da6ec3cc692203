"""Tags that calls which differ do not share, within what a transport allows."""

import pytest

from ringfold.comm.fingerprint import fingerprint, history_with, shares_of, tag_of
from ringfold.comm.trace import Signature


@pytest.mark.parametrize(
    "max_tag, bits",
    [(32767, 15), (8388607, 23), (2**31 - 1, 30), (2**63 - 1, 30), (32768, 15), (32766, 14)],
)
def test_tags_fill_what_is_allowed_and_no_more(max_tag: int, bits: int) -> None:
    """Half of the bits for works in flight, half for calls that differ; MPI's least is 32767."""
    shares = shares_of(max_tag)
    low = bits // 2
    works = {tag_of(sequence, 0, shares) for sequence in range(5, 5 + (1 << low))}
    assert works == set(range(1 << low))
    marks = [mark << 32 - (bits - low) for mark in range(1 << bits - low)]
    calls = {tag_of(1 << low, mark, shares) for mark in marks[:: max(1, len(marks) // 256)]}
    assert len(calls) == min(len(marks), 256) and all(tag % (1 << low) == 0 for tag in calls)
    assert tag_of(-1, (1 << 32) - 1, shares) == (1 << bits) - 1 <= max_tag


def test_a_call_that_differs_is_never_forgotten() -> None:
    """Else ranks that are a call apart would meet behind enough calls that are alike."""
    left, right = history_with(0, 1), history_with(0, 1 + (1 << 31))
    for mark in range(1000):
        left, right = history_with(left, mark), history_with(right, mark)
        assert left != right and 0 <= left < 1 << 32
    assert history_with(history_with(0, 1), 2) != history_with(history_with(0, 2), 1)


def test_all_that_ranks_must_agree_on_makes_a_difference() -> None:
    """Of a scatter the root alone knows what is scattered."""
    call = Signature("reduce", "sum", "float32", 8, 1)
    others = [
        (call._replace(**changed), "ring")
        for changed in (
            {"operation": "broadcast"},
            {"op": "max"},
            {"dtype": "float64"},
            {"elements": 9},
            {"peer": 0},
        )
    ]
    marks = {fingerprint(*asked) for asked in [(call, "ring"), (call, "tree"), *others]}
    assert len(marks) == 7
    scatters = [Signature("scatter", "", "int64", n, 1) for n in (0, 8)]
    assert len({fingerprint(one, "tree") for one in scatters}) == 1
    assert fingerprint(scatters[0]._replace(peer=0), "tree") != fingerprint(scatters[0], "tree")
