"""One clock for all ranks: how far each node's clock is ahead of rank 0's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .communicator import Communicator

_ROUNDS = 12


@dataclass(frozen=True)
class Offset:
    """How far a clock is ahead of rank 0's, in nanoseconds, give or take `error`, at a moment.

    at: of the clock itself.
    """

    ahead: float
    error: float
    at: int


def cristian(samples: Sequence[tuple[int, int, int]]) -> Offset:
    """Return the offset of a remote clock from (sent, remote time, received) of several questions.

    The answer was given between the sending and the receiving; the shortest trip bounds it best
    (Cristian, Probabilistic Clock Synchronization, 1989, section 3).
    """
    sent, remote, received = min(samples, key=lambda sample: sample[2] - sample[0])
    return Offset(remote - (sent + received) / 2, (received - sent) / 2, remote)


def between(first: Offset, last: Offset, at: int) -> float:
    """Return how far the clock is ahead at a moment, clocks drifting evenly between two offsets."""
    if last.at == first.at:
        return first.ahead
    return first.ahead + (last.ahead - first.ahead) * (at - first.at) / (last.at - first.at)


def measure_offset(
    comm: Communicator,
    clock: Callable[[], int] = time.monotonic_ns,
    leaders: Sequence[int] | None = None,
) -> Offset:
    """Return how far this rank's clock is ahead of rank 0's; collective.

    leaders: for each rank the one whose clock it shares; the lowest of its node where None. Rank 0
    asks each leader for the time, one after the other.
    """
    if leaders is None:
        lowest = comm.node.broadcast(np.array([comm.rank]))
        leaders = comm.allgather(lowest).ravel().tolist()
    offsets = np.zeros((comm.size, 3))
    offsets[:, 2] = clock()
    for leader in sorted(set(leaders) - {leaders[0]}):
        if comm.rank == 0:
            found = cristian([_ask(comm, leader, clock) for _ in range(_ROUNDS)])
            offsets[leader] = found.ahead, found.error, found.at
        elif comm.rank == leader:
            for _ in range(_ROUNDS):
                comm.recv(np.zeros(1, np.int64), 0)
                comm.send(np.array([clock()], np.int64), 0)
    comm.broadcast(offsets)
    ahead, error, at = offsets[leaders[comm.rank]].tolist()
    return Offset(ahead, error, clock() if leaders[comm.rank] == leaders[0] else int(at))


def _ask(comm: Communicator, leader: int, clock: Callable[[], int]) -> tuple[int, int, int]:
    answer = np.zeros(1, np.int64)
    sent = clock()
    comm.send(answer, leader)
    comm.recv(answer, leader)
    return sent, int(answer[0]), clock()
