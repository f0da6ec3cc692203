"""Evaluate rules: always at arrays of ranks, so that what is proven, priced and drawn is run.

A rule may tell an array of ranks something else than one rank: `~` inverts the truth of an array's
elements, and the bits of an int. No rule is ever asked about an int.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ScheduleError
from .schedule import NOBODY, Chunks, Peers, Ranks, Round, Schedule

Integers = npt.NDArray[np.int64]


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
    members are no ranks in order, or with which a rank sends to none of them, or no such chunks.
    """
    ranks = members_of(round.peers, size, index)
    (dst,) = on_ranks(round.peers, lambda: (round.peers.dst(ranks, size),), ranks.size, index)
    first, length = spans(round.chunks, ranks, size, num_chunks, index)
    at = np.flatnonzero((dst != NOBODY) & (length != 0))
    step = Moves(ranks[at], dst[at], first[at], length[at])
    _require_there(step, size, num_chunks, index)
    return step


def _require_there(step: Moves, size: int, num_chunks: int, index: int | None) -> None:
    """Refuse messages to ranks, and of chunks, that there are not."""
    limits = ((step.dst, size), (step.first, num_chunks), (step.length, num_chunks + 1))
    # What is below 0 is above all else without its sign.
    if all(found.view(np.uint64).max(initial=0) < limit for found, limit in limits):
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
    """Return whom ranks send to, and whom they receive from; ScheduleError as of `on_ranks`."""
    dst, src = on_ranks(
        peers, lambda: (peers.dst(ranks, size), peers.src(ranks, size)), ranks.size, index
    )
    return dst, src


def spans(
    chunks: Chunks, ranks: Integers, size: int, num_chunks: int, index: int | None = None
) -> tuple[Integers, Integers]:
    """Return (first, length) of the chunks that ranks send; ScheduleError as of `on_ranks`."""
    first, length = on_ranks(
        chunks, lambda: span_of(chunks, ranks, size, num_chunks), ranks.size, index
    )
    return first, length


def span_of(chunks: Chunks, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
    """Return a rule's span; ScheduleError where that is no pair, as the firsts of two ranks."""
    told: Any = chunks.span(rank, size, num_chunks)
    if not isinstance(told, tuple | list) or len(told) != 2:
        count = f" of {len(told)}" if isinstance(told, tuple | list) else ""
        raise ScheduleError(
            f"{type(chunks).__name__}.span returned a {type(told).__name__}{count}, expected two "
            "parts: (first, length)"
        )
    return told[0], told[1]


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


def on_ranks(
    rule: Peers | Chunks, evaluate: Callable[[], Iterable[Ranks]], count: int, index: int | None
) -> list[Integers]:
    """Return what a rule says of `count` ranks, as arrays; raise ScheduleError where it cannot."""
    with in_round(index):
        try:
            return [_of_each(np.asarray(part, dtype=np.int64), count) for part in evaluate()]
        except ScheduleError:
            raise
        except Exception as error:
            raise ScheduleError(
                f"the rule {type(rule).__name__} cannot be evaluated at an array of {count} ranks "
                f"({type(error).__name__}: {error}); it is given a read-only array, never one "
                "rank: np.where instead of `if`, and a new array instead of a changed one"
            ) from error


@contextmanager
def in_round(index: int | None) -> Iterator[None]:
    """Say of a ScheduleError, as of a rule within a rule, in which round it was, where known."""
    try:
        yield
    except ScheduleError as error:
        if index is None or error.round is not None:
            raise
        raise ScheduleError(str(error), round=index) from error


def _of_each(told: Integers, count: int) -> Integers:
    return told if told.shape == (count,) else np.broadcast_to(told, count)


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
