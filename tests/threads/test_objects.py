"""Python values come from rank to rank as they are."""

import numpy as np
import pytest

from ringfold import CommTimeout, MismatchError, run_local
from ringfold.parallel import (
    allgather_objects,
    broadcast_object,
    gather_objects,
    recv_object,
    scatter_objects,
    send_object,
)


def test_values_of_every_rank_and_of_one() -> None:
    def value(rank: int) -> object:
        return [{"rank": rank, "text": "é" * 1000 * rank}, None, "", (rank,) * rank][rank]

    def main(comm):
        given = value(comm.rank)
        from_two = broadcast_object(given, comm, root=2)
        assert (from_two is given) == (comm.rank == 2)
        return allgather_objects(given, comm), from_two, broadcast_object(given, comm)

    expected = [value(rank) for rank in range(4)], value(2), value(0)
    assert run_local(4, main) == [expected] * 4


def test_what_is_still_under_way_is_not_written_over(monkeypatch):
    """Behind a CommTimeout the value goes on, and reached the others as the next one."""

    def main(comm):
        sent = []

        def too_late(x, root):
            sent.append(x)
            raise CommTimeout("rank 0 has waited in vain")

        with monkeypatch.context() as patch:
            patch.setattr(comm, "broadcast", too_late)
            with pytest.raises(CommTimeout):
                broadcast_object("first", comm)
            patch.setattr(comm, "allgather", lambda x: too_late(x, 0))
            with pytest.raises(CommTimeout):
                comm.allgatherv(np.ones(3))
        assert broadcast_object("second", comm) == "second"
        first, rows = (bytes(letter[0]) for letter in sent)
        assert b"first" in first and np.ones(3).tobytes() in rows
        one, other = comm.letters(1), comm.letters(1)
        assert one is not other
        comm.give_back(other)
        assert comm.letters(1) is other

    run_local(1, main)


def test_a_value_that_cannot_even_say_why_it_has_no_pickle():
    class Mute(Exception):
        def __str__(self):
            raise ValueError("mute")

    class Value:
        def __reduce__(self):
            raise Mute

    def main(comm):
        with pytest.raises(TypeError, match="rank 1 cannot be sent, as it has no pickle: Mute"):
            allgather_objects(Value() if comm.rank == 1 else 0, comm)

    run_local(2, main)


VALUES = [{"text": "é" * 900 * k, "none": None} for k in range(4)]


def test_values_to_one_rank_and_from_one() -> None:
    def main(comm):
        mine = VALUES[comm.rank]
        gathered = [gather_objects(mine, comm, root) for root in range(comm.size)]
        assert [one is not None for one in gathered] == [r == comm.rank for r in range(comm.size)]
        given = reversed(VALUES) if comm.rank == 2 else "whatever"
        return gathered[comm.rank], scatter_objects(given, comm, root=2)

    found = run_local(4, main)
    assert [gathered for gathered, _ in found] == [VALUES] * 4
    assert [value for _, value in found] == VALUES[::-1]


def test_values_from_rank_to_rank_of_any_size_and_in_order() -> None:
    values = [None, {}, "a" * 5000, ("b", 2), b"c" * 1600, [*range(9)]]

    def main(comm):
        if comm.rank == 0:
            for tag in (5, 3):
                for value in values:
                    send_object((tag, value), 1, comm, tag)
            return recv_object(1, comm)
        for tag in (5, 3):
            assert [recv_object(0, comm, tag) for _ in values] == [(tag, value) for value in values]
        send_object("answer", 0, comm)
        return None

    assert run_local(2, main)[0] == "answer"


@pytest.mark.parametrize("length", [0, 1, 1500, 1900, 2030, 2031, 2032, 2033, 2034, 2040, 9999])
def test_a_value_as_large_as_its_letter(length: int) -> None:
    def main(comm):
        if comm.rank == 0:
            send_object("x" * length, 1, comm)
        else:
            assert recv_object(0, comm) == "x" * length

    run_local(2, main)


def test_what_is_no_value_to_be_sent_and_who_is_told() -> None:
    unsent = "a value of rank {} cannot be sent, as it has no pickle"

    def main(comm):
        if comm.rank < 2:
            with pytest.raises(TypeError, match=unsent.format(1)):
                gather_objects(print if comm.rank == 0 else (k for k in "a"), comm)
        else:
            assert gather_objects(3, comm) is None
        with pytest.raises(TypeError, match=unsent.format(1)) as caught:
            scatter_objects([1, 2, lambda: 3] if comm.rank == 1 else None, comm, root=1)
        assert (caught.value.__cause__ is not None) == (comm.rank == 1)
        with pytest.raises(TypeError, match=unsent.format(comm.rank)):
            send_object(lambda: 3, 0, comm)
        if comm.rank == 0:
            with pytest.raises(ValueError, match=r"values: expected 3, one for each rank, got 2"):
                scatter_objects("ab", comm)
            with pytest.raises(TypeError, match=r"expected 3, one for each rank, got int"):
                scatter_objects(3, comm)
        for call in (gather_objects, scatter_objects):
            with pytest.raises(ValueError, match=r"root 3 is outside 0\.\.2"):
                call([1, 2, 3], comm, root=3)
        assert scatter_objects("abc", comm) == "abc"[comm.rank]

    run_local(3, main)


def test_ranks_that_differ_in_the_root_are_told() -> None:
    """Of few rows, each got those of all; of many, ranks waited for each other."""

    def main(comm):
        with pytest.raises(MismatchError, match=r"gatherv: .*for rank 0; rank 1: .*for rank 1"):
            comm.gatherv(np.ones(3), root=comm.rank)
        with pytest.raises(MismatchError, match=r"rank \d expects a value of rank \d, .*\[0, 1\]"):
            scatter_objects("ab", comm, root=comm.rank)
        with pytest.raises(MismatchError, match=r"values came from ranks \[\]"):
            scatter_objects("ab", comm, root=1 - comm.rank)

    run_local(2, main)
