"""Lift a schedule of a few ranks into groups of many: inside nodes, or across them.

All nodes hold equally many neighbouring ranks, and the lifted rules are formulas again, for any
number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm

import numpy as np

from .answers import dst_of, span_of, src_of
from .claims import kind_of
from .collective import ALLGATHER, ALLREDUCE, BROADCAST, REDUCE_SCATTER, Collective
from .errors import ScheduleError
from .places import scale_of
from .schedule import NOBODY, Chunks, Peers, Ranks, Round, Schedule


@dataclass(frozen=True)
class Inside(Peers):
    """Run a rule for `width` ranks in every node of `width` neighbouring ranks."""

    of: Peers
    width: int

    def dst(self, rank: Ranks, size: int) -> Ranks:
        return self._rank(rank, dst_of(self.of, rank % self.width, self.width))

    def src(self, rank: Ranks, size: int) -> Ranks:
        return self._rank(rank, src_of(self.of, rank % self.width, self.width))

    def _rank(self, rank: Ranks, place: Ranks) -> Ranks:
        return np.where(place == NOBODY, NOBODY, rank - rank % self.width + place)


@dataclass(frozen=True)
class InsideChunks(Chunks):
    """Send what a rule says for `width` ranks and `num_flat` chunks, of `scale` chunks each."""

    of: Chunks
    width: int
    num_flat: int
    scale: int

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        first, length = span_of(self.of, rank % self.width, self.width, self.num_flat)
        return first * self.scale, length * self.scale

    def alike(self) -> Chunks:
        return replace(self, of=kind_of(self.of))


@dataclass(frozen=True)
class Across(Peers):
    """Run a rule for as many ranks as nodes among the ranks of equal place: all lanes at once.

    lane: the only place that takes part; None for all.
    """

    of: Peers
    width: int
    lane: int | None = None

    def dst(self, rank: Ranks, size: int) -> Ranks:
        return self._rank(rank, dst_of(self.of, rank // self.width, size // self.width))

    def src(self, rank: Ranks, size: int) -> Ranks:
        return self._rank(rank, src_of(self.of, rank // self.width, size // self.width))

    def _rank(self, rank: Ranks, node: Ranks) -> Ranks:
        place = rank % self.width
        idle = (node == NOBODY) | (self.lane is not None and place != self.lane)
        return np.where(idle, NOBODY, node * self.width + place)


@dataclass(frozen=True)
class AcrossChunks(Chunks):
    """Send what a rule says for the nodes and `num_flat` chunks, of `scale` chunks each.

    stride: lane p works on the chunks from p * stride on.
    """

    of: Chunks
    width: int
    num_flat: int
    scale: int
    stride: int

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        node, num_nodes = rank // self.width, size // self.width
        first, length = span_of(self.of, node, num_nodes, self.num_flat)
        whole = length == self.num_flat
        first = np.where(whole, 0, first)
        if np.any((first + length > self.num_flat) & ~whole):
            raise ScheduleError(
                "a run of chunks that wraps around a lane's part has no place in the whole buffer"
            )
        return rank % self.width * self.stride + first * self.scale, length * self.scale

    def alike(self) -> Chunks:
        return AcrossLength(kind_of(self.of), self.width, self.num_flat, self.scale)


@dataclass(frozen=True)
class AcrossLength(Chunks):
    """Send as many chunks as AcrossChunks, which others of a kind may not be able to place."""

    of: Chunks
    width: int
    num_flat: int
    scale: int

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        node, num_nodes = rank // self.width, size // self.width
        _, length = span_of(self.of, node, num_nodes, self.num_flat)
        return rank * 0, length * self.scale


def inside(flat: Schedule, num_chunks: int) -> tuple[Round, ...]:
    """Lift a schedule for one node into all nodes of flat.size neighbouring ranks."""
    scale = scale_of(flat, num_chunks)
    return tuple(
        Round(
            Inside(round.peers, flat.size),
            InsideChunks(round.chunks, flat.size, flat.num_chunks, scale),
            round.reduce,
        )
        for round in flat.rounds
    )


def across(
    flat: Schedule, width: int, num_chunks: int, lane: int | None = None
) -> tuple[Round, ...]:
    """Lift a schedule whose ranks are nodes of `width` neighbouring ranks.

    In every lane, the ranks of place p run it on the p-th of `width` equal parts of the chunks; or,
    where a lane is named, that lane alone runs it on all chunks.
    """
    stride = num_chunks // width if lane is None else 0
    scale = scale_of(flat, num_chunks if lane is not None else stride)
    return tuple(
        Round(
            Across(round.peers, width, lane),
            AcrossChunks(round.chunks, width, flat.num_chunks, scale, stride),
            round.reduce,
        )
        for round in flat.rounds
    )


def nest(reduce_part: Schedule, between: Schedule, gather_part: Schedule) -> Schedule:
    """Nest an allreduce between nodes in a reduce_scatter and an allgather within them.

    reduce_part, gather_part: for the ranks of one node.  between: an allreduce for the nodes.
    Returns: an allreduce for reduce_part.size * between.size ranks, neighbours on a node.
    Raises: ScheduleError for parts of other collectives, sizes or chunks.
    """
    parts = (reduce_part, between, gather_part)
    for part, collective in zip(parts, (REDUCE_SCATTER, ALLREDUCE, ALLGATHER), strict=True):
        _require(part, collective)
    width = reduce_part.size
    if gather_part.size != width or gather_part.num_chunks != reduce_part.num_chunks:
        raise ScheduleError(
            f"cannot nest: {reduce_part!r} does not meet {gather_part!r} in size and num_chunks"
        )
    num_chunks = reduce_part.num_chunks * between.num_chunks
    return Schedule(
        between.collective,
        width * between.size,
        num_chunks,
        (
            *inside(reduce_part, num_chunks),
            *across(between, width, num_chunks),
            *inside(gather_part, num_chunks),
        ),
    )


def nest_broadcast(between: Schedule, within: Schedule) -> Schedule:
    """Broadcast between the nodes in the root's lane, then within every node.

    Returns: a broadcast for within.size * between.size ranks, from place within.root of node
    between.root.
    """
    for part in (between, within):
        _require(part, BROADCAST)
    width, lane = within.size, within.root
    num_chunks = lcm(between.num_chunks, within.num_chunks)
    return Schedule(
        between.collective,
        width * between.size,
        num_chunks,
        (*across(between, width, num_chunks, lane), *inside(within, num_chunks)),
        root=between.root * width + lane,
    )


def _require(part: Schedule, collective: Collective) -> None:
    if part.collective is not collective:
        raise ScheduleError(
            f"cannot nest: {part!r}, expected a schedule for {collective.name} in its place"
        )
