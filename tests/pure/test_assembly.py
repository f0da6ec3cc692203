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

        return Assembly(step, lambda: None)

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
    assert not come(second)  # in the second step, which the first rank has not taken
    assert come(first)
    assert come(second)
    assert set(table.values()) == {1} and len(table) == 4  # nothing was sent twice


def test_it_begins_anew_once_both_steps_are_taken():
    (alone,), table = rooms(1)
    assert come(alone) and come(alone)
    assert sorted(table) == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_an_error_and_what_the_check_raises_keep_what_was_taken():
    numbers, errors = [], [RuntimeError("a wire"), None]

    def step(number):
        numbers.append(number)
        if error := errors.pop() if errors else None:
            raise error
        return
        yield

    def check():
        if len(numbers) == 1:
            raise ValueError("others called something else")

    assembly = Assembly(step, check)
    with pytest.raises(ValueError, match="something else"):
        come(assembly)
    with pytest.raises(RuntimeError, match="a wire"):
        come(assembly)
    assert come(assembly) and numbers == [0, 1, 1]
