"""An algorithm of your own: proven for every size, priced, and run.

ringfold verify examples/own_algorithm.py:both_ways --sizes 2-64
ringfold simulate examples/own_algorithm.py:both_ways --ranks 1000 --nbytes 1GiB
mpirun -n 4 python examples/own_algorithm.py
"""

from dataclasses import dataclass

import numpy as np

import ringfold
from ringfold.comm.collective import ALLREDUCE
from ringfold.comm.schedule import Chunks, Ranks, Round, Schedule, Shift


@dataclass(frozen=True)
class Half(Chunks):
    """Of twice as many chunks as ranks, send an even one ahead (0) or an odd one behind (1)."""

    offset: int
    which: int

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        return 2 * ((rank + self.offset) % size) + self.which, rank * 0 + 1

    def alike(self) -> Chunks:
        return Half(0, self.which)


def both_ways(size: int) -> Schedule:
    """Run one ring on the even chunks and one, the other way round, on the odd chunks."""
    ahead, behind = Shift(+1), Shift(-1)
    rounds = []
    for index in range(size - 1):
        rounds += [Round(ahead, Half(-index, 0), True), Round(behind, Half(index, 1), True)]
    for index in range(size - 1):
        rounds += [Round(ahead, Half(1 - index, 0)), Round(behind, Half(index - 1, 1))]
    return Schedule(ALLREDUCE, size, num_chunks=2 * size, rounds=tuple(rounds))


def main(comm: ringfold.Communicator) -> None:
    """Add up with it, and compare with what is known."""
    x = np.arange(10.0) * (comm.rank + 1)
    comm.allreduce(x, algorithm=both_ways(comm.size))
    assert (x == np.arange(10.0) * (comm.size * (comm.size + 1) // 2)).all()
    if comm.rank == 0:
        print(f"added up on {comm.size} ranks: {x}")


if __name__ == "__main__":
    with ringfold.Communicator() as world:
        main(world)
