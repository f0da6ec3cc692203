"""Python values come from rank to rank as they are."""

import numpy as np
import pytest

from ringfold import CommTimeout, run_local
from ringfold.parallel import allgather_objects, broadcast_object


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
