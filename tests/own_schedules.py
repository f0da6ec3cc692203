"""Allreduces as nobody would write them: random rounds, of which `verify` decides alone.

Runs of chunks begin anywhere, wrap around, overlap and are exchanged; partial sums are copied
around before all has been added. The same seed gives the same schedule on every rank.

And a rule that tells one rank, as an int, something else than ranks in an array.
"""

import random
from dataclasses import dataclass, replace

import numpy as np
from contract import data, expected, reopened

from ringfold import Communicator
from ringfold.comm.collective import ALLREDUCE
from ringfold.comm.errors import ScheduleError
from ringfold.comm.evaluation import draw
from ringfold.comm.listed import Listed, ListedChunks
from ringfold.comm.schedule import NOBODY, Chunks, Ranks, Round, Schedule
from ringfold.comm.verify import verify

Cells = dict[tuple[int, int], frozenset[int]]
"""(rank, chunk) -> whose contributions it holds."""


def random_allreduce(seed: int, size: int, raw: bool = False) -> Schedule:
    """Return a proven schedule.  raw: every message that is added is one rank's own."""
    rng = random.Random(seed)
    num_chunks = rng.randint(1, 5)
    held = {(rank, c): frozenset({rank}) for rank in range(size) for c in range(num_chunks)}
    # Those that may go on to add and be added: every contribution to a chunk in one value.
    live = dict(held)
    schedule = Schedule(ALLREDUCE, size, num_chunks, ())
    everybody = frozenset(range(size))
    middle = [rng.randrange(size) for _ in range(num_chunks)] if raw else None
    while any(value != everybody for value in held.values()):
        round, received = _round(rng, size, num_chunks, held, live, middle)
        longer = replace(schedule, rounds=(*schedule.rounds, round))
        if not received or _refused(longer):
            continue
        schedule = longer
        for (rank, chunk), value in received.items():
            held[rank, chunk] = value | held[rank, chunk]
            if round.reduce:  # what it was made of, elsewhere, goes no further
                for other in range(size):
                    if live.get((other, chunk), value) < held[rank, chunk]:
                        live.pop((other, chunk), None)
            live[rank, chunk] = held[rank, chunk]
    verify(schedule)
    return schedule


def check_own_schedules(comm: Communicator, count: int) -> None:
    """Run some in messages of 8 bytes, so that much is added while much is still to be sent."""
    compiled = comm._settings.compiled
    with reopened(comm, compiled=compiled, segment_bytes=8) as small:
        for seed in range(count):
            # One by one, so that half widths may travel as they are.
            schedule = random_allreduce(seed, comm.size, raw=seed % 2 == 1)
            elements = 5 * schedule.num_chunks + seed % 3
            for dtype, op in ((np.float32, "sum"), (np.float16, "mean")):
                x = data(comm.rank, elements, dtype)
                small.allreduce(x, op, algorithm=schedule)
                right = expected(op, comm.size, elements, dtype)
                np.testing.assert_array_equal(x, right, draw(schedule))


def _round(
    rng: random.Random,
    size: int,
    num_chunks: int,
    held: Cells,
    live: Cells,
    middle: list[int] | None,
) -> tuple[Round, Cells]:
    """Return a round that is sound but for the order of messages, and what it brings.

    middle: of every chunk, whose own contribution every sum has; the others are added one by one.
    """
    reduce = rng.random() < 0.6
    to, origin = [NOBODY] * size, [NOBODY] * size
    first, length = [0] * size, [0] * size
    received: Cells = {}
    meets: dict[tuple[int, frozenset[int]], frozenset[int]] = {}
    targets = rng.sample(range(size), size)
    if size > 1 and rng.random() < 0.6:  # in pairs
        order = rng.sample(range(size), size)
        for left, right in zip(order[::2], order[1::2], strict=False):
            targets[left], targets[right] = right, left
        if size % 2:
            targets[order[-1]] = order[-1]
    for rank, target in enumerate(targets):
        if rank == target:
            continue
        start, most = rng.randrange(num_chunks), rng.randint(1, num_chunks)
        for step in range(most):
            chunk = (start + step) % num_chunks
            mine, theirs = live.get((rank, chunk)), held[target, chunk]
            if mine is None:
                break
            if not reduce:
                if not theirs < mine:
                    break
            else:
                # A value meets one other in a round, or contributions would be in two sums.
                if live.get((target, chunk)) != theirs or mine & theirs:
                    break
                if middle and (len(mine) > 1 or middle[chunk] not in mine | theirs):
                    break
                if meets.get((chunk, mine), theirs) != theirs:
                    break
                if meets.get((chunk, theirs), mine) != mine:
                    break
                meets[chunk, mine], meets[chunk, theirs] = theirs, mine
            received[target, chunk] = mine
            length[rank] = step + 1
        if length[rank]:
            to[rank], origin[target], first[rank] = target, rank, start
    peers = Listed(tuple(to), tuple(origin))
    return Round(peers, ListedChunks(tuple(first), tuple(length)), reduce), received


def _refused(schedule: Schedule) -> bool:
    """Tell whether the last round is refused, not the end that is still to come."""
    try:
        verify(schedule)
    except ScheduleError as error:
        return not any(text in str(error) for text in ("ends without", "in another order"))
    return False


@dataclass(frozen=True)
class Inverted(Chunks):
    """Send chunk 1 from even ranks and 0 from odd ones, or the other way round."""

    invert: bool

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        low = rank % 2 == 0
        if self.invert:
            low = ~low
        return np.where(low, 1, 0), rank * 0 + 1
