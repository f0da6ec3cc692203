"""Collectives that fold, over shared memory: each form of each, as rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..kernels.records import ALL, LINE_BYTES, PAIR, Row, Where
from .chunks import bounds
from .fused_rows import (
    INPUT,
    MEET,
    OUTPUT,
    STAGES,
    OneRow,
    Rows,
    Shape,
    chunks_of,
    copied,
    fetched,
    folded,
    named,
    others_of,
    part,
    table,
)

_RESULTS = (Where.RESULT_0, Where.RESULT_1)


def allreduce_shared(shape: Shape) -> Rows:
    """Fold this rank's part of all buffers into all of them."""
    low, high = part(shape.count, shape.itemsize, shape.size, shape.rank)
    at = low * shape.itemsize
    return table([MEET, *folded(Where.BUFFERS, ALL, at, Where.BUFFERS, at, high - low), MEET])


def reduce_shared(shape: Shape) -> Rows:
    """Fold this rank's part of all buffers into root's."""
    low, high = part(shape.count, shape.itemsize, shape.size, shape.rank)
    at = low * shape.itemsize
    fold = folded(Where.BUFFERS, shape.root, at, Where.BUFFERS, at, high - low)
    return table([MEET, *fold, MEET])


def reduce_scatter_shared(shape: Shape) -> Rows:
    """Fold this rank's piece of all buffers into its result."""
    low, high = bounds(shape.count, shape.size, shape.rank)
    fold = folded(Where.OWN, OUTPUT, 0, Where.BUFFERS, low * shape.itemsize, high - low)
    return table([MEET, *fold, MEET])


def allreduce_eager(shape: Shape) -> Rows:
    """Fold everybody's copies into this rank's buffer."""
    return _eager_fold(shape, 0, shape.count, INPUT)


def reduce_eager(shape: Shape) -> Rows:
    """Fold everybody's copies into root's buffer."""
    return _eager_fold(shape, 0, shape.count if shape.rank == shape.root else 0, INPUT)


def reduce_scatter_eager(shape: Shape) -> Rows:
    """Fold this rank's piece of everybody's copies into its result."""
    return _eager_fold(shape, *bounds(shape.count, shape.size, shape.rank), OUTPUT)


def _eager_fold(shape: Shape, low: int, high: int, into: int) -> Rows:
    publish = copied(Where.EAGER, shape.rank, 0, Where.OWN, INPUT, 0, shape.nbytes)
    at = low * shape.itemsize
    fold = folded(Where.OWN, into, 0, Where.EAGER, at, high - low)
    return table([*publish, MEET, *fold])


def allreduce_staged(shape: Shape) -> Rows:
    """Copy a chunk in, fold the one before, copy the one before that out; then meet.

    What a rank folds itself never leaves its buffer but to be read by the others.
    """
    return _staged_fold(shape, everywhere=True)


def reduce_staged(shape: Shape) -> Rows:
    """Do the same, but root alone copies out."""
    return _staged_fold(shape, everywhere=False)


def _staged_fold(shape: Shape, everywhere: bool) -> Rows:
    item, rank, size = shape.itemsize, shape.rank, shape.size
    chunks = list(chunks_of(shape.count, shape.stage_bytes // item))
    others = [peer for peer in range(size) if peer != rank]
    keeps = everywhere or rank == shape.root
    rows: list[OneRow] = []
    for step in range(len(chunks) + 2):
        if step >= 2 and keeps:
            low, high = chunks[step - 2]
            for peer in others:
                first, last = part(high - low, item, size, peer)
                at, nbytes = (low + first) * item, (last - first) * item
                rows += copied(Where.OWN, INPUT, at, _RESULTS[step % 2], peer, 0, nbytes)
        if 1 <= step <= len(chunks):
            low, high = chunks[step - 1]
            first, last = part(high - low, item, size, rank)
            result, stage = _RESULTS[(step - 1) % 2], STAGES[(step - 1) % 2]
            here = (low + first) * item
            rows += _sources(shape, stage, first * item, here)
            if everywhere:
                rows.append(named(Where.TARGETS, 0, Where.OWN, INPUT, here))
                rows.append(named(Where.TARGETS, 1, result, rank, 0))
                rows += folded(Where.TARGETS, PAIR, 0, Where.SOURCES, 0, last - first)
            elif keeps:
                rows += folded(Where.OWN, INPUT, here, Where.SOURCES, 0, last - first)
            else:
                rows += folded(result, rank, 0, Where.SOURCES, 0, last - first)
        if step < len(chunks):
            low, high = chunks[step]
            for peer in others:
                first, last = part(high - low, item, size, peer)
                at, nbytes = (low + first) * item, (last - first) * item
                rows += copied(STAGES[step % 2], rank, first * item, Where.OWN, INPUT, at, nbytes)
        if step <= len(chunks):
            rows.append(MEET)
    return table(rows)


def _sources(shape: Shape, stage: int, staged: int, here: int) -> list[OneRow]:
    """Let SOURCES name the same piece: of every peer in its stage, of this rank in its buffer."""
    return [
        named(Where.SOURCES, peer, Where.OWN, INPUT, here)
        if peer == shape.rank
        else named(Where.SOURCES, peer, stage, peer, staged)
        for peer in range(shape.size)
    ]


def allreduce_cma(shape: Shape) -> Rows:
    """Fold this rank's part of all buffers, chunk by chunk, and write each back while it is hot."""
    item, rank, size = shape.itemsize, shape.rank, shape.size
    low, high = part(shape.count, item, size, rank)
    rows = [MEET]
    for first, last in chunks_of(high - low, _room(shape) // item):
        at, nbytes = (low + first) * item, (last - first) * item
        rows += _read_peers(shape, at, nbytes)
        rows += folded(Where.OWN, INPUT, at, Where.SOURCES, 0, last - first)
        rows += [
            (Row.WRITE, Where.PEERS, peer, at, Where.OWN, INPUT, at, nbytes)
            for peer in others_of(shape)
        ]
    return table([*rows, MEET])


def reduce_scatter_cma(shape: Shape) -> Rows:
    """Fold this rank's piece of all buffers into its result."""
    item = shape.itemsize
    low, high = bounds(shape.count, shape.size, shape.rank)
    rows = [MEET]
    for first, last in chunks_of(high - low, _room(shape) // item):
        rows += _read_peers(shape, (low + first) * item, (last - first) * item)
        rows += folded(Where.OWN, OUTPUT, first * item, Where.SOURCES, 0, last - first)
    return table([*rows, MEET])


def _room(shape: Shape) -> int:
    """Return the bytes of each peer's piece that are in this rank's staging place at a time."""
    room = shape.stage_bytes // max(shape.size - 1, 1)
    return max(room // LINE_BYTES * LINE_BYTES, LINE_BYTES)


def _read_peers(shape: Shape, at: int, nbytes: int) -> list[OneRow]:
    """Copy the same piece of each peer's buffer in, and let SOURCES name it, with the own one."""
    rows: list[OneRow] = [named(Where.SOURCES, shape.rank, Where.OWN, INPUT, at)]
    for place, peer in enumerate(others_of(shape)):
        into = place * _room(shape)
        rows += fetched(Where.STAGE_0, shape.rank, into, peer, at, nbytes)
        rows.append(named(Where.SOURCES, peer, Where.STAGE_0, shape.rank, into))
    return rows


def reduce_scatter_staged(shape: Shape) -> Rows:
    """Copy a chunk of every peer's piece in, and fold this rank's."""
    item, size = shape.itemsize, shape.size
    pieces = [bounds(shape.count, size, rank) for rank in range(size)]
    room = shape.stage_bytes // size // LINE_BYTES * LINE_BYTES
    low, high = pieces[shape.rank]
    rows: list[OneRow] = []
    for step, (first, _) in enumerate(chunks_of(max(b - a for a, b in pieces), room // item)):
        for peer, (start, end) in enumerate(pieces):
            at = min(start + first, end)
            nbytes = (min(at + room // item, end) - at) * item
            if peer != shape.rank:
                rows += copied(
                    STAGES[step % 2], shape.rank, peer * room, Where.OWN, INPUT, at * item, nbytes
                )
        rows.append(MEET)
        at = min(low + first, high)
        count = min(at + room // item, high) - at
        into = (at - low) * item
        rows += _sources(shape, STAGES[step % 2], shape.rank * room, at * item)
        rows += folded(Where.OWN, OUTPUT, into, Where.SOURCES, 0, count)
    return table([*rows, MEET])


FOLDS: Mapping[str, Mapping[str, Callable[[Shape], Rows]]] = {
    "allreduce": {
        "shared": allreduce_shared,
        "eager": allreduce_eager,
        "staged": allreduce_staged,
        "cma": allreduce_cma,
    },
    "reduce": {
        "shared": reduce_shared,
        "eager": reduce_eager,
        "staged": reduce_staged,
    },
    "reduce_scatter": {
        "shared": reduce_scatter_shared,
        "eager": reduce_scatter_eager,
        "staged": reduce_scatter_staged,
        "cma": reduce_scatter_cma,
    },
}
"""name -> form, see `comm.fused` -> what lowers it."""
