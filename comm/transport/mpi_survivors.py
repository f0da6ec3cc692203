"""The processes that go on when others have died, by the fault tolerance of MPI (ULFM)."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Sequence

import numpy as np

from ..errors import CommError, PeerLost
from ..lookout import Lookout
from ..settings import Seat
from .mpi import MpiTransport, load_mpi
from .mpi_errors import raising, revoking
from .mpi_exit import die_at_end, say_goodbye
from .mpi_launch import require_own_place
from .mpi_patience import Patience, ends_after
from .mpi_start import end_mpi

_NOT_ALL = (
    "of the ranks that live, not all have come to agree on who does: MPI takes no notice of a "
    "process that ends with a status other than 0, as by os._exit"
)

_ENDING = 1 << 8
"""What a rank that ends in the middle gives to `agree`, beside none of the flags of others."""

_END_SECONDS = 5.0
"""How long such a rank waits to hear whether all others end, too."""


class Survivors:
    """The MPI processes of this job that live, on a communicator that nothing else uses.

    joined: whether this process was started by `grow` of others, which it has met then.
    """

    def __init__(self, seconds: float, lookout: Lookout) -> None:
        """Start with all of the job, or with those that have started this process; collective.

        seconds: that ranks wait for each other at most.  lookout: sees to it that MPI starts, which
        waits for every rank and is told of no death yet.
        """
        require_own_place()
        self._patience = Patience(seconds, _NOT_ALL)
        ends = "mpi4py.MPI" not in sys.modules
        if ends:
            # MPI_Finalize of Open MPI 5.0 may wait for the dead for ever: `leave` says when to
            # call it. Whoever has imported mpi4py.MPI before has left that to mpi4py.
            import mpi4py

            mpi4py.rc.finalize = False
        self._mpi = load_mpi(lookout)
        self._clean = False
        self._left = False
        self._whole = True
        parent = self._mpi.Comm.Get_parent()
        self.joined = bool(parent != self._mpi.COMM_NULL)
        try:
            with raising(self._mpi, "meeting the other ranks"):
                self._base = parent.Merge(True) if self.joined else self._mpi.COMM_WORLD.Dup()
        except PeerLost as error:
            if not self.joined:
                raise
            raise CommError(
                "a rank has died before this process, started in place of a dead one, had met the "
                f"others, so that it cannot join them: {error}"
            ) from error
        self._base.Set_errhandler(self._mpi.ERRORS_RETURN)
        if ends:
            atexit.register(self._end, os.getpid())

    @property
    def size(self) -> int:
        """Return how many there are."""
        return int(self._base.Get_size())

    def open(self) -> MpiTransport:
        """Open a transport over them; collective."""
        with revoking(self._base):
            return MpiTransport(self._mpi, self._base)

    def agree(self, flags: int) -> int:
        """Return the flags that all of them give, alike on all; 0 if one has died; collective."""
        with self._patience:
            try:
                return int(self._base.Agree(flags))
            except self._mpi.Exception:
                return 0

    def shrink(self) -> list[int]:
        """Go on without the dead, and return their ranks; collective over the living."""
        before = self._base
        with self._patience:
            after = before.Shrink()
        after.Set_errhandler(self._mpi.ERRORS_RETURN)
        old, new = before.Get_group(), after.Get_group()
        ranks = list(range(old.Get_size()))
        places = self._mpi.Group.Translate_ranks(old, ranks, new)
        self._base, self._whole = after, False
        return [rank for rank, place in zip(ranks, places, strict=True) if place < 0]

    def grow(self, count: int, command: Sequence[str], folder: str, seconds: float) -> None:
        """Start so many processes more in a folder; they come behind the others; collective.

        seconds: until they must have come, else this process ends, as MPI cannot be told to stop
        waiting for them.

        Raises: CommError where they cannot be started; PeerLost where one of these has died.
        """
        what = (
            f"of {count} processes started in place of dead ranks, not all have opened MPI, or "
            "another rank has died meanwhile"
        )
        with raising(self._mpi, f"starting {count} processes"), ends_after(seconds, what):
            place = self._mpi.Info.Create({"wdir": folder})
            both = self._base.Spawn(command[0], list(command[1:]), count, place, root=0)
            place.Free()
            both.Set_errhandler(self._mpi.ERRORS_RETURN)
            self._base = both.Merge(False)
        self._base.Set_errhandler(self._mpi.ERRORS_RETURN)

    def leave(self) -> None:
        """Prepare for the end of this process; collective over the living."""
        self._left = True
        self._clean = self.agree(1) == 1 and self._whole and not self.joined

    def _end(self, process: int) -> None:
        """End MPI as it wants to be ended, but where ranks have died end without it.

        The processes of a job that goes on without ranks may do that: mpirun's status is theirs.
        A process that ends while others go on is a rank that has died.
        """
        if os.getpid() != process or self._mpi.Is_finalized():
            return
        if not self._left and not self._all_end():
            die_at_end()
            return
        if self._clean:
            end_mpi(self._mpi, Lookout(Seat.read()))
        elif self.joined:
            say_goodbye()

    def _all_end(self) -> bool:
        """Tell whether all that live end now, as this one does; else let them know that it does.

        It takes part in what the others agree on next, which fails by that; who is still at
        something else finds out when this process is gone.
        """
        found = np.array([_ENDING], np.int32)
        try:
            request = self._base.Iagree(found)
            self._ending = request, found  # MPI may still write there
            end = time.monotonic() + _END_SECONDS
            while not request.Test():
                if time.monotonic() > end:
                    return False
                time.sleep(0.005)
        except self._mpi.Exception:  # of those that have died; the flags are those of the living
            pass
        return bool(found[0] & _ENDING)
