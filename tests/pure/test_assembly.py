"""Coming together is broken off and gone on with, and nothing of it is done twice."""

import pytest

from ringfold.comm.assembly import Assembly


def rooms(size):
    """Return assemblies of `size` ranks whose tokens lie on a table, and the table."""
    table: dict[tuple[int, int], int] = {}

    def make(rank):
        def step(number):
            table[number, rank] = table.get((number, rank), 0) + 1
            while any((number, other) not in table for other in range(size)):
                yield []

        return Assembly(step)

    return [make(rank) for rank in range(size)], table


def come(assembly, looks=3):
    """Wait a while; tell whether the step was taken."""
    steps = assembly.come()
    for _ in range(looks):
        try:
            next(steps)
        except StopIteration:
            return True
    steps.close()
    return False


def test_who_gives_up_does_not_let_others_go_on():
    (first, second), table = rooms(2)
    assert not come(first)  # gives up
    assert come(second) and not second.complete
    assert not come(second)  # the second step, which the first rank has not taken
    assert come(first) and not first.complete
    assert come(first) and first.complete
    assert come(second) and second.complete
    assert set(table.values()) == {1}  # nothing was sent twice


def test_it_begins_anew_once_complete_and_after_an_error():
    (alone,), table = rooms(1)
    for _ in range(2):
        assert come(alone) and come(alone) and alone.complete
    assert sorted(table) == [(0, 0), (1, 0), (2, 0), (3, 0)]

    def broken(number):
        if not table.pop((0, 0), 0):
            return
        raise RuntimeError("a wire")
        yield

    failing = Assembly(broken)
    with pytest.raises(RuntimeError):
        come(failing)
    assert come(failing) and not failing.complete
