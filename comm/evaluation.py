"""Evaluate rules: always at arrays of ranks, so that what is proven, priced and drawn is run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .answers import Integers, dst_of, in_round, span_of, src_of
from .errors import ScheduleError
from .schedule import NOBODY, Chunks, Peers, Round, Schedule


@dataclass(frozen=True)
class Moves:
    """All messages of one round as arrays of equal length, in order of the sending rank."""

    src: Integers
    dst: Integers
    first: Integers
    length: Integers

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield each message as plain numbers: (src, dst, first, length)."""
        columns = (self.src, self.dst, self.first, self.length)
        return zip(*(column.tolist() for column in columns), strict=True)


def moves(round: Round, size: int, num_chunks: int, index: int | None = None) -> Moves:
    """Evaluate a round at its members; ranks that send nothing are left out.

    Raises: ScheduleError, with the round's index, for a rule that does not work on arrays, whose
    members are not ranks in rising order, or that sends to a rank, or sends chunks, out of range.
    """
    ranks = members_of(round.peers, size, index)
    with in_round(index):
        dst = dst_of(round.peers, ranks, size)
        first, length = span_of(round.chunks, ranks, size, num_chunks)
    at = np.flatnonzero((dst != NOBODY) & (length != 0))
    step = Moves(ranks[at], dst[at], first[at], length[at])
    _require_there(step, size, num_chunks, index)
    return step


def _require_there(step: Moves, size: int, num_chunks: int, index: int | None) -> None:
    """Refuse messages to ranks, or of chunks, that do not exist."""

    def most(found: Integers) -> int:
        """Return the largest; a negative number counts as larger than any other."""
        return int(found.view(np.uint64).max(initial=0))

    if most(step.dst) < size and most(step.first) < num_chunks and most(step.length) <= num_chunks:
        return
    for rank, dst, first, length in step:
        if not 0 <= dst < size:
            raise ScheduleError(f"sends to rank {dst} of {size}", round=index, rank=rank)
        if not (0 <= first < num_chunks and 0 <= length <= num_chunks):
            raise ScheduleError(
                f"sends {length} chunks from {first} of {num_chunks}",
                round=index,
                rank=rank,
                chunk=first,
            )


def peers_of(
    peers: Peers, ranks: Integers, size: int, index: int | None = None
) -> tuple[Integers, Integers]:
    """Return whom ranks send to, and whom they receive from; ScheduleError with the round."""
    with in_round(index):
        return dst_of(peers, ranks, size), src_of(peers, ranks, size)


def spans(
    chunks: Chunks, ranks: Integers, size: int, num_chunks: int, index: int | None = None
) -> tuple[Integers, Integers]:
    """Return (first, length) of the chunks that ranks send; ScheduleError with the round."""
    with in_round(index):
        return span_of(chunks, ranks, size, num_chunks)


def all_ranks(size: int) -> Integers:
    """Return 0, 1, ... size - 1 as a rule is given them."""
    return _read_only(np.arange(size, dtype=np.int64))


def members_of(peers: Peers, size: int, index: int | None = None) -> Integers:
    """Return the ranks that a rule says take part; ScheduleError for what are none, in order."""
    try:
        found = peers.members(size)
        ranks = np.asarray(found)
    except Exception as error:
        raise ScheduleError(
            f"the members of {type(peers).__name__} cannot be told "
            f"({type(error).__name__}: {error})",
            round=index,
        ) from error
    proper = ranks.ndim == 1 and (ranks.dtype.kind in "iu" or not ranks.size)
    if proper and ranks.size:
        proper = bool(ranks[0] >= 0 and ranks[-1] < size and (ranks[1:] > ranks[:-1]).all())
    if not proper:
        raise ScheduleError(
            f"the members of {type(peers).__name__} are {found!r}: expected ranks of {size}, in "
            "order, each once",
            round=index,
        )
    return _read_only(ranks.astype(np.int64, copy=False))


def _read_only(ranks: Integers) -> Integers:
    """Return a view through which a rule cannot change what other rules are asked about."""
    view = ranks.view()
    view.flags.writeable = False
    return view


def draw(schedule: Schedule) -> str:
    """Write a schedule out, a line per round: `0>1:2+` is rank 0 sending chunk 2 to be added.

    Runs of chunks are written first..last, and wrap around where last is below first.
    """
    lines = []
    for index, round in enumerate(schedule.rounds):
        step = moves(round, schedule.size, schedule.num_chunks, index)
        sign = "+" if round.reduce else ""
        words = [
            f"{src}>{dst}:{shown_run(first, length, schedule.num_chunks)}{sign}"
            for src, dst, first, length in step
        ]
        lines.append(f"{index}: " + " ".join(words))
    return "\n".join(lines)


def shown_run(first: int, length: int, num_chunks: int) -> str:
    """Return a run of chunks as text: its first and its last."""
    return str(first) if length == 1 else f"{first}..{(first + length - 1) % num_chunks}"
