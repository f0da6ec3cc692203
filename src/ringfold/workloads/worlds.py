"""The ranks that a training run has, which may become fewer, or others, on the way."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..comm.communicator import Communicator
from ..comm.elastic import Elastic, Loss
from ..comm.errors import PeerLost

if TYPE_CHECKING:
    from .options import Options

__all__ = ["NOT_BEGUN", "Fixed", "Left", "Living", "Planned", "World", "open_world"]

NOT_BEGUN = -1
"""What ranks have done that have not all begun; those that come in then begin with them."""

_AS_LONG_AS_IT_TAKES = 1e9
"""Seconds that a rank without work waits for those that train."""


class Left(Exception):
    """Say that this rank leaves the run, as its options have said beforehand."""


class World(Protocol):
    """The ranks of a run.

    comm: that of the ranks there are now.  joined: whether this one came into a run under way,
    with `newcomers` ranks in all.  survives: whether a run can go on after PeerLost.
    `begin(step)` comes before every step, `commit` before a step is taken as done, `finished` when
    nothing is left to do (False: ask again), `recover` after PeerLost from any of them.
    """

    @property
    def comm(self) -> Communicator: ...

    joined: bool
    newcomers: int
    survives: bool

    def begin(self, step: int) -> None: ...

    def commit(self) -> None: ...

    def finished(self) -> bool: ...

    def recover(self, done: int) -> Loss: ...

    def close(self) -> None: ...


class Fixed:
    """The ranks that mpirun has started, to the end."""

    joined = False
    newcomers = 0
    survives = False

    def __init__(self) -> None:
        self.comm = Communicator()

    def begin(self, step: int) -> None:
        """Go on."""

    def commit(self) -> None:
        """Go on."""

    def finished(self) -> bool:
        return True

    def recover(self, done: int) -> Loss:
        raise PeerLost("this run does not go on without a rank")

    def close(self) -> None:
        self.comm.close()


class Living:
    """The ranks that live; see `Elastic`."""

    survives = True

    def __init__(self, grow: bool) -> None:
        self._elastic = Elastic(command=[sys.executable, *sys.orig_argv[1:]] if grow else None)
        found = self._elastic.losses[-1] if self._elastic.joined else None
        self.joined = found is not None and found.done != NOT_BEGUN
        self.newcomers = 0 if found is None else found.joined

    @property
    def comm(self) -> Communicator:
        return self._elastic.comm

    def begin(self, step: int) -> None:
        """Go on."""

    def commit(self) -> None:
        self._elastic.commit()

    def finished(self) -> bool:
        return self._elastic.finished()

    def recover(self, done: int) -> Loss:
        return self._elastic.recover(done)

    def close(self) -> None:
        self._elastic.__exit__(None, None, None)


class Planned:
    """Ranks that leave, alive, before steps that are known beforehand.

    What a run comes to whose ranks die at these steps; needs no MPI that survives it.
    """

    joined = False
    newcomers = 0
    survives = True

    def __init__(self, comm: Communicator, departures: Sequence[tuple[int, int]]) -> None:
        """departures: (rank, step); ranks as they are numbered at the start."""
        self.comm = comm
        self._departures = sorted(departures, key=lambda pair: pair[1])
        self._members = list(range(comm.size))
        self._step = 0
        self._known = False

    def begin(self, step: int) -> None:
        self._step = step
        if self._departures and self._departures[0][1] <= step:
            raise PeerLost(f"a rank leaves before step {step}, as --membership has it")

    def commit(self) -> None:
        """Go on."""

    def finished(self) -> bool:
        """Wait until nobody trains any more; PeerLost where a rank leaves before that."""
        step = self._leaving_before(None)
        if step is None:
            return True
        self._step, self._known = step, True
        raise PeerLost(f"a rank leaves before step {step}, as --membership has it")

    def _leaving_before(self, step: int | None) -> int | None:
        """Return the step before which ranks leave now; None once all ranks ask with None.

        A rank without work asks with None as long as the others train. Collective.
        """
        mine = np.array([-1 if step is None else step])
        told = self.comm.allreduce(mine, op="max", blocking=False).wait(_AS_LONG_AS_IT_TAKES)
        return None if told[0] < 0 else int(told[0])

    def recover(self, done: int) -> Loss:
        start = time.perf_counter()
        if not self._departures or self._departures[0][1] > self._step:
            raise PeerLost("a rank was lost that --membership does not name")
        if not self._known:
            self._leaving_before(self._step)
        self._known = False
        gone = [rank for rank, step in self._departures if step <= self._step]
        self._departures = [pair for pair in self._departures if pair[1] > self._step]
        lost = tuple(place for place, rank in enumerate(self._members) if rank in gone)
        leaves = self._members[self.comm.rank] in gone
        made = self.comm.split(None if leaves else 0, key=self.comm.rank)
        if made is None:
            raise Left(f"rank {self.comm.rank} leaves before step {done}")
        self._members = [rank for rank in self._members if rank not in gone]
        self.comm = made
        return Loss(lost, made.size, done, 0, time.perf_counter() - start)

    def close(self) -> None:
        # Ranks that have left do not come: only the last group can be closed together.
        self.comm.close()


def open_world(options: Options | None) -> World:
    """Open what the options ask for; None where they could not be read.  Collective."""
    if options is not None and options.elastic is not None:
        return Living(grow=options.elastic == "grow")
    if options is not None and options.membership:
        return Planned(Communicator(), options.membership)
    return Fixed()
