"""Python values come from rank to rank as they are."""

from ringfold import run_local
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
