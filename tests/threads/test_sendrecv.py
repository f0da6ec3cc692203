"""Send one way and receive the other in one call; the ring itself: contract.check_messages."""

from typing import Any

import numpy as np
import pytest

from ringfold import Communicator, MismatchError, PeerLost, run_local


def test_at_the_border_there_is_nobody_on_one_side() -> None:
    """Halo rows of a grid that does not wrap around, as with MPI.PROC_NULL."""

    def main(comm: Communicator) -> None:
        up = comm.rank - 1 if comm.rank else None
        down = comm.rank + 1 if comm.rank + 1 < comm.size else None
        for step in range(3):
            mine, above = np.full(5, 10.0 * step + comm.rank), np.full(5, -1.0)
            assert comm.sendrecv(mine, down, above, up) is above
            assert (above == (-1 if up is None else mine - 1)).all()
        assert comm.sendrecv(mine, None, above, None) is above

    run_local(3, main)


def test_what_is_wrong_is_told_before_anything_is_sent() -> None:
    """A send that went out before the error would meet the next receive."""

    def main(comm: Communicator) -> None:
        peer, x, y = 1 - comm.rank, np.full(4, float(comm.rank)), np.empty(4)
        fixed = np.empty(4)
        fixed.flags.writeable = False
        wrong: list[tuple[Any, ...]] = [
            (x, peer, x, peer),
            (x, peer, fixed, peer),
            (x, peer, "no array", peer),
            (x, peer, y, 2),
            (x, 2, y, peer),
            (x, peer, y, peer, -1),
            ("no array", peer, y, peer),
        ]
        for known in range(2):
            for given in wrong:
                with pytest.raises((TypeError, ValueError)):
                    comm.sendrecv(*given)
            comm.sendrecv(x + known, peer, y, peer)
            assert (y == peer + known).all(), known

    run_local(2, main)


def test_of_each_half_the_error_is_its_own() -> None:
    """As of a send and a recv: here is another length, there is nobody."""

    def main(comm: Communicator) -> None:
        x, y = np.zeros(4), np.zeros(3)
        with pytest.raises(MismatchError, match=r"32 bytes where rank . expects 24"):
            comm.sendrecv(x, 1 - comm.rank, y, 1 - comm.rank)
        comm.barrier()
        if comm.rank == 1:
            assert (comm.recv(x, 0, 5) == 0).all()
            return
        with pytest.raises(PeerLost, match="rank 1 is gone"):
            comm.sendrecv(x, 1, y, 1, 5)

    run_local(2, main)
