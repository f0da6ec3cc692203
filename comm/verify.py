"""Prove a schedule: nothing lost, nothing twice, every receive has its send, same order everywhere.

Every (rank, chunk) is followed through the rounds as the set of ranks whose contributions it holds
and the order in which they were added. Two values are the same to the last bit when they come from
the same tree of additions, up to swapping the two operands of one addition, which IEEE 754 addition
allows.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .chunks import ranges
from .claims import Kinds, refuse_false_claims
from .collective import ALLTOALL
from .errors import ScheduleError
from .evaluation import Moves
from .runnable import matched, refuse_forwarding, refuse_overwritten_sends
from .schedule import Round, Schedule, require_hashable
from .texts import shown_ranks


class Held(NamedTuple):
    """What a rank holds of a chunk: contributors as a bit set, and the id of the additions."""

    contributors: int
    order: int


@dataclass(frozen=True)
class Proof:
    """What was found while a schedule was proven.

    messages: messages in all rounds and of all ranks.
    raw_reduce: every message that is added carries one rank's own contribution, no partial sum, and
        is added to an own contribution or to all of one sum that nobody has been sent yet.
    digest: 8 hexadecimal digits that differ where messages do, but for chance.
    """

    rounds: int
    messages: int
    raw_reduce: bool
    digest: str


class _Orders:
    """Give every tree of additions a number, equal trees the same one."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int], int] = {}

    def leaf(self, rank: int) -> int:
        return self._numbers.setdefault((rank, -1), len(self._numbers))

    def add(self, left: int, right: int) -> int:
        pair = (left, right) if left < right else (right, left)
        return self._numbers.setdefault(pair, len(self._numbers))


Cell = dict[tuple[int, int], Held]


def verify(schedule: Schedule) -> Proof:
    """Prove that a schedule keeps its collective's promise for its size and root.

    Returns: the Proof.
    Raises: ScheduleError with the first round, rank and chunk that break it, and for rules that
    claim to be alike to others, or to be of few ranks, and are not.
    """
    require_hashable(schedule)
    orders = _Orders()
    held = _start(schedule, orders)
    messages = digest = 0
    raw_reduce = True
    summed: Summed = {}
    kinds: Kinds = {}
    for index, round in enumerate(schedule.rounds):
        moves = matched(schedule, round, index)
        arriving = _sent(schedule, moves, held, index)
        refuse_overwritten_sends(schedule, round, moves, index)
        refuse_false_claims(schedule, round, moves, index, kinds)
        if schedule.collective is ALLTOALL:
            refuse_forwarding(schedule, arriving, moves, index)
        raw_reduce = raw_reduce and _adds_raw(schedule, round, moves, held, summed)
        for (rank, chunk), value in arriving.items():
            held[rank, chunk] = _received(
                schedule, round, held.get((rank, chunk)), value, orders, (index, rank, chunk)
            )
        messages += len(moves.src)
        words = np.stack((moves.src, moves.dst, moves.first, moves.length))
        digest = zlib.crc32(words.tobytes(), zlib.crc32(bytes([round.reduce]), digest))
    _finish(schedule, held)
    numbers = f"{schedule.size} {schedule.num_chunks} {schedule.root}"
    digest = zlib.crc32(numbers.encode(), digest)
    return Proof(len(schedule.rounds), messages, raw_reduce, f"{digest:08x}")


def _start(schedule: Schedule, orders: _Orders) -> Cell:
    size, num_chunks, root = schedule.size, schedule.num_chunks, schedule.root
    before = schedule.collective.before
    return {
        (rank, chunk): Held(1 << rank, orders.leaf(rank))
        for rank in range(size)
        for chunk in range(num_chunks)
        if before(rank, chunk, size, num_chunks, root)
    }


def _chunks(first: int, length: int, num_chunks: int) -> list[int]:
    return [chunk for low, high in ranges(first, length, num_chunks) for chunk in range(low, high)]


def _sent(schedule: Schedule, moves: Moves, held: Cell, index: int) -> Cell:
    """Return what arrives: (receiver, chunk) -> the value as it was at the start of the round."""
    arriving: Cell = {}
    for src, dst, first, length in moves:
        for chunk in _chunks(first, length, schedule.num_chunks):
            value = held.get((src, chunk))
            if value is None:
                raise ScheduleError(
                    f"sends to rank {dst} a chunk that it does not hold",
                    round=index,
                    rank=src,
                    chunk=chunk,
                )
            arriving[dst, chunk] = value
    return arriving


Summed = dict[tuple[int, int], tuple[int, int] | None]
"""(rank, chunk) -> the run of chunks that was added, None where the sum has been used since."""


def _adds_raw(schedule: Schedule, round: Round, moves: Moves, held: Cell, summed: Summed) -> bool:
    """Tell whether a round keeps the promise of Proof.raw_reduce, and note what it does to sums.

    A run of chunks is added to as a whole (`program.with_accumulator`), and is rounded once it is
    sent or copied over: what is added afterwards, or to a part of it, would be rounded twice.
    """
    if not round.reduce and not summed:
        return True
    num_chunks = schedule.num_chunks

    def own(rank: int, chunk: int) -> bool:
        return (rank, chunk) in held and held[rank, chunk].contributors.bit_count() == 1

    for src, dst, first, length in moves:
        run = (first, length)
        for chunk in _chunks(*run, num_chunks):
            if round.reduce:
                goes_on = own(dst, chunk) or summed.get((dst, chunk)) == run
                if not own(src, chunk) or not goes_on:
                    return False
                summed[dst, chunk] = run
                continue
            for rank in (src, dst):
                used = summed.get((rank, chunk)) or (0, 0)
                summed.update(((rank, other), None) for other in _chunks(*used, num_chunks))
    return True


def _received(
    schedule: Schedule,
    round: Round,
    old: Held | None,
    new: Held,
    orders: _Orders,
    place: tuple[int, int, int],
) -> Held:
    index, rank, chunk = place
    if old is None and round.reduce:
        # A collective that only moves adds nothing at all, whatever a round of it says.
        raise ScheduleError(
            "would add to a chunk that it does not hold", round=index, rank=rank, chunk=chunk
        )
    if old is None:
        return new
    twice = old.contributors & new.contributors
    if round.reduce:
        if twice and not schedule.collective.idempotent:
            raise ScheduleError(
                f"would add the contribution of {_ranks(twice)} twice",
                round=index,
                rank=rank,
                chunk=chunk,
            )
        return Held(old.contributors | new.contributors, orders.add(old.order, new.order))
    lost = old.contributors & ~new.contributors
    if lost:
        raise ScheduleError(
            f"a copy overwrites, and so loses, the contribution of {_ranks(lost)}",
            round=index,
            rank=rank,
            chunk=chunk,
        )
    return new


def _finish(schedule: Schedule, held: Cell) -> None:
    size, num_chunks, root = schedule.size, schedule.num_chunks, schedule.root
    collective = schedule.collective
    last = len(schedule.rounds) - 1 if schedule.rounds else None
    for chunk in range(num_chunks):
        due = sum(
            1 << rank
            for rank in range(size)
            if collective.before(rank, chunk, size, num_chunks, root)
        )
        first: tuple[int, int] | None = None
        for rank in range(size):
            if not collective.after(rank, chunk, size, num_chunks, root):
                continue
            value = held.get((rank, chunk))
            missing = due & ~(value.contributors if value else 0)
            if value is None or missing:
                raise ScheduleError(
                    f"ends without the contribution of {_ranks(missing)}",
                    round=last,
                    rank=rank,
                    chunk=chunk,
                )
            if first is None:
                first = (rank, value.order)
            elif value.order != first[1] and not collective.idempotent:
                raise ScheduleError(
                    f"adds in another order than rank {first[0]}: the results would differ in the "
                    "last bits",
                    round=last,
                    rank=rank,
                    chunk=chunk,
                )


def _ranks(bits: int) -> str:
    return shown_ranks([rank for rank in range(bits.bit_length()) if bits >> rank & 1])
