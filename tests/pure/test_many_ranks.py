"""Errors that tell of many ranks are short, and still tell of the one that is astray."""

from ringfold.comm.cycles import told
from ringfold.comm.notices import Row, Standing
from ringfold.comm.texts import few, listed, shown_ranks, table
from ringfold.comm.trace import Signature

SIZE = 1000


def test_few_ranks_have_a_row_each() -> None:
    assert table("here", {1: "a", 0: "a"}) == "here: rank 0: a; rank 1: a"


def test_of_many_ranks_those_that_are_alike_share_a_row() -> None:
    """A thousand ranks made a thousand rows on one line, all but one of them the same."""
    rows = dict.fromkeys(range(SIZE), "allreduce of 5") | {700: "allreduce of 6"}
    assert table("here", rows) == (
        "here: ranks 0, 1, 2, 3, 4, 5, 6, 7 and 991 more: allreduce of 5; rank 700: allreduce of 6"
    )


def test_of_very_many_rows_that_of_most_ranks_and_those_of_fewest_are_shown() -> None:
    rows = {rank: f"in step {rank // 20}" for rank in range(SIZE)}
    rows |= dict.fromkeys(range(100, 300), "in step 9") | {700: "at the end"}
    text = table("here", rows)
    assert text.count(": ") == 1 + 8 and "rank 700: at the end" in text
    assert "ranks 100, 101, 102, 103, 104, 105, 106, 107 and 192 more: in step 9" in text
    assert text.endswith(f"; and {SIZE - 200 - 1 - 19 - 5 * 20} ranks more")


def test_a_circle_of_many_ranks_is_told_by_the_first() -> None:
    """64 ranks that all send before they receive got 7 KB of clauses that were nearly alike."""
    row = Row(1, Signature("send", "", "float64", 5, 1), "train.py:40", "")
    clauses = told(tuple(Standing(rank, rank, 1, "world", row) for rank in range(SIZE)))
    assert len(clauses) < 1500 and clauses.endswith("and 992 more")
    assert "rank 0 for rank 1 in world, in send" in clauses
    assert "rank 1 for rank 0" in told(tuple(Standing(r, r, 1, "world", row) for r in range(2)))


def test_lists_of_ranks() -> None:
    assert listed([]) == "[]" and listed([0, 3]) == "[0, 3]"
    assert listed(range(10)) == "[0, 1, 2, 3, 4, 5, 6, 7 and 2 more]"
    assert shown_ranks([2]) == "rank 2" and few(["a", "b"], "; ") == "a; b"
