"""Whether ranks can run a round as it stands: they meet, and what they send is there to be sent.

What that comes to, `verify` proves.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .errors import ScheduleError
from .evaluation import Moves, all_ranks, members_of, moves, peers_of, shown_run
from .schedule import NOBODY, Round, Schedule


def matched(schedule: Schedule, round: Round, index: int) -> Moves:
    """Return the round's moves, every send having the receive that its receiver expects.

    Raises: ScheduleError, as all of this module do.
    """
    size = schedule.size
    peers = round.peers
    to, origin = peers_of(peers, all_ranks(size), size, index)
    dst, src = to.tolist(), origin.tolist()
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
    if not np.array_equal(step.dst, to[step.src]):
        raise ScheduleError(
            f"{type(peers).__name__} tells its members of other peers than all ranks: what it says "
            "of a rank must not depend on those that it is asked about beside it",
            round=index,
        )
    return step


def refuse_overwritten_sends(schedule: Schedule, round: Round, step: Moves, index: int) -> None:
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


def refuse_forwarding(
    schedule: Schedule, arriving: Iterable[tuple[int, int]], step: Moves, index: int
) -> None:
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
