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
from .collective import ALLTOALL
from .errors import ScheduleError
from .schedule import (
    NOBODY,
    Moves,
    Round,
    Schedule,
    members_of,
    moves,
    on_ranks,
    require_hashable,
    shown_run,
)
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
    Raises: ScheduleError with the first round, rank and chunk that break it.
    """
    require_hashable(schedule)
    orders = _Orders()
    held = _start(schedule, orders)
    messages = digest = 0
    raw_reduce = True
    summed: Summed = {}
    for index, round in enumerate(schedule.rounds):
        step = _matched(schedule, round, index)
        arriving = _sent(schedule, step, held, index)
        _refuse_overwritten_sends(schedule, round, step, index)
        if schedule.collective is ALLTOALL:
            _refuse_forwarding(schedule, arriving, step, index)
        raw_reduce = raw_reduce and _adds_raw(schedule, round, step, held, summed)
        for (rank, chunk), value in arriving.items():
            held[rank, chunk] = _received(
                schedule, round, held.get((rank, chunk)), value, orders, (index, rank, chunk)
            )
        messages += len(step.src)
        words = np.stack((step.src, step.dst, step.first, step.length))
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


def _matched(schedule: Schedule, round: Round, index: int) -> Moves:
    """Return the round's moves, every send having the receive that its receiver expects."""
    size = schedule.size
    ranks = np.arange(size, dtype=np.int64)
    peers = round.peers
    dst, src = (
        told.tolist()
        for told in on_ranks(
            peers, lambda: (peers.dst(ranks, size), peers.src(ranks, size)), size, index
        )
    )
    for rank in range(size):
        for peer, back, does, answers in (
            (dst[rank], src, "sends to", "receives from"),
            (src[rank], dst, "receives from", "sends to"),
        ):
            if peer == NOBODY:
                continue
            if not 0 <= peer < size:
                raise ScheduleError(f"{does} rank {peer} of {size}", round=index, rank=rank)
            if peer == rank:
                raise ScheduleError(f"{does} itself", round=index, rank=rank)
            if back[peer] != rank:
                other = "nobody" if back[peer] == NOBODY else f"rank {back[peer]}"
                raise ScheduleError(
                    f"{does} rank {peer}, which {answers} {other}: one of them would wait for ever",
                    round=index,
                    rank=rank,
                )
    members = set(members_of(peers, size, index).tolist())
    for rank in range(size):
        if (dst[rank], src[rank]) != (NOBODY, NOBODY) and rank not in members:
            raise ScheduleError(
                f"takes part, and is none of the members of {type(peers).__name__}",
                round=index,
                rank=rank,
            )
    step = moves(round, size, schedule.num_chunks, index)
    for rank, _, first, length in step:
        if not 0 <= first < schedule.num_chunks or length > schedule.num_chunks:
            raise ScheduleError(
                f"sends {length} chunks from {first} of {schedule.num_chunks}",
                round=index,
                rank=rank,
                chunk=first,
            )
    return step


def _chunks(first: int, length: int, num_chunks: int) -> list[int]:
    return [chunk for low, high in ranges(first, length, num_chunks) for chunk in range(low, high)]


def _sent(schedule: Schedule, step: Moves, held: Cell, index: int) -> Cell:
    """Return what arrives: (receiver, chunk) -> the value as it was at the start of the round."""
    arriving: Cell = {}
    for src, dst, first, length in step:
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


def _refuse_overwritten_sends(schedule: Schedule, round: Round, step: Moves, index: int) -> None:
    """Refuse what changes a chunk before it has been sent in the same round.

    A copy has no memory of its own to arrive in. What is added has, a segment at a time: segment k
    is added once segment k has been sent (`executor`), so that a run that begins with the sent one,
    or before it, meets only what has left.
    """
    num_chunks = schedule.num_chunks
    sent_first, sent_length = np.zeros((2, schedule.size), dtype=np.int64)
    sent_first[step.src], sent_length[step.src] = step.first, step.length
    first, length = sent_first[step.dst], sent_length[step.dst]
    ahead = (step.first - first) % num_chunks
    inside = ahead < length
    covers = (length > 0) & ((first - step.first) % num_chunks < step.length)
    wrong = np.flatnonzero(inside & (ahead > 0) if round.reduce else inside | covers)
    if not wrong.size:
        return
    at = wrong[0]
    rank, src = int(step.dst[at]), int(step.src[at])
    problem = f"receives from rank {src} a copy of a chunk that it sends in the same round"
    if round.reduce:
        come, leave = (
            shown_run(int(start[at]), int(run[at]), num_chunks)
            for start, run in ((step.first, step.length), (first, length))
        )
        problem = (
            f"receives chunks {come} from rank {src}, to be added, while it sends {leave}: it "
            "would add to chunks that it has yet to send; let both begin with the same chunk, or "
            "send in a round before"
        )
    chunk = int(step.first[at] if inside[at] else first[at])
    raise ScheduleError(problem, round=index, rank=rank, chunk=chunk)


Summed = dict[tuple[int, int], tuple[int, int] | None]
"""(rank, chunk) -> the run of chunks that was added, None where the sum has been used since."""


def _adds_raw(schedule: Schedule, round: Round, step: Moves, held: Cell, summed: Summed) -> bool:
    """Tell whether a round keeps the promise of Proof.raw_reduce, and note what it does to sums.

    A run of chunks is added to as a whole (`program.with_accumulator`), and is rounded once it is
    sent or copied over: what is added afterwards, or to a part of it, would be rounded twice.
    """
    if not round.reduce and not summed:
        return True
    num_chunks = schedule.num_chunks

    def own(rank: int, chunk: int) -> bool:
        return (rank, chunk) in held and held[rank, chunk].contributors.bit_count() == 1

    for src, dst, first, length in step:
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


def _refuse_forwarding(schedule: Schedule, arriving: Cell, step: Moves, index: int) -> None:
    """Refuse what is not sent straight from its row to its column: there is no other memory."""
    sources = {dst: src for src, dst, _, _ in step}
    for rank, cell in arriving:
        if divmod(cell, schedule.size) != (sources[rank], rank):
            raise ScheduleError(
                f"forwards a chunk to rank {rank}; an alltoall can be run only where chunks go "
                "straight to their place",
                round=index,
                rank=sources[rank],
                chunk=cell,
            )


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
