import pytest

from ringfold.comm.algorithms import build
from ringfold.comm.errors import ScheduleError
from ringfold.comm.evaluation import draw
from ringfold.comm.transform import compose, reverse
from ringfold.comm.verify import verify


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 13])
@pytest.mark.parametrize(
    "collective, algorithm, dual",
    [
        ("allgather", "ring", "reduce_scatter"),
        ("allgather", "recursive_doubling", "reduce_scatter"),
        ("allgather", "pairwise", "reduce_scatter"),
        ("broadcast", "tree", "reduce"),
        ("broadcast", "ring", "reduce"),
        ("scatter", "tree", "gather"),
        ("gather", "tree", "scatter"),
    ],
)
def test_backwards_it_keeps_the_duals_promise(
    collective: str, algorithm: str, dual: str, size: int
) -> None:
    forwards = build(collective, algorithm, size)
    backwards = reverse(forwards)
    assert backwards.collective.name == dual
    assert len(backwards.rounds) == len(forwards.rounds)
    verify(backwards)


def test_every_message_goes_back_where_it_came_from() -> None:
    assert draw(build("scatter", "tree", 4)) == "0: 0>2:2..3\n1: 0>1:1 2>3:3"
    assert draw(reverse(build("scatter", "tree", 4))) == "0: 1>0:1 3>2:3\n1: 2>0:2..3"


def test_twice_backwards_is_forwards() -> None:
    scatter = build("scatter", "tree", 6, 2)
    assert draw(reverse(reverse(scatter))) == draw(scatter)


def test_an_allreduce_has_no_dual() -> None:
    with pytest.raises(ScheduleError, match="allreduce has no dual"):
        reverse(build("allreduce", "ring", 3))


def test_parts_that_do_not_meet_are_refused() -> None:
    with pytest.raises(ScheduleError, match="cannot compose allgather with broadcast"):
        compose(build("allgather", "ring", 3), build("broadcast", "tree", 3))
    with pytest.raises(ScheduleError, match="size 3 does not meet size 4"):
        compose(build("reduce_scatter", "ring", 3), build("allgather", "ring", 4))
    with pytest.raises(ScheduleError, match="root 0 does not meet root 1"):
        compose(build("reduce", "tree", 3), build("broadcast", "tree", 3, 1))


@pytest.mark.parametrize("reduce_scatter", ["ring", "recursive_halving", "pairwise"])
@pytest.mark.parametrize("allgather", ["ring", "recursive_doubling", "pairwise"])
def test_any_halves_make_an_allreduce(reduce_scatter: str, allgather: str) -> None:
    for size in (2, 3, 6, 8):
        left, right = (
            build("reduce_scatter", reduce_scatter, size),
            build("allgather", allgather, size),
        )
        verify(compose(left, right))
