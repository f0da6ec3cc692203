"""Lower a collective to one rank's program over shared memory: pairwise, its rounds fused.

Where all ranks map each other's memory, what the pairwise schedule sends in size - 1 rounds is read
in one pass between two meetings. There are four forms:

shared: the buffers themselves are mapped.  Everybody comes, each rank does its part of the work in
place, everybody is done.
eager: up to EAGER_BYTES are copied to a place of this rank's in the shared memory, and read from
there by all after one meeting.  Two places are used by turns, so that nobody waits to write.
staged: larger private buffers pass through cache-sized places, chunk by chunk.
cma: larger private buffers where processes have access to each other's memory (`comm.cma`): what a
rank folds it copies from there, a cache-sized chunk at a time, and writes back to all.

Pure functions; addresses come in when a program is bound to a group (`comm.board`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..kernels.records import ALL, LINE_BYTES, PAIR, ROW_WORDS, Row, Where
from .chunks import bounds

EAGER_BYTES = 8 << 10

READ_FROM: Mapping[str, int] = {
    "allreduce": 4 << 20,
    "reduce_scatter": 4 << 20,
    "allgather": 0,
    "gather": 0,
    "alltoall": 0,
}
"""Bytes of the flat buffer for each rank from which on a collective takes the form "cma".

Measured on 2 and 4 ranks. Copying within the kernel has a cost for every page, and what all peers
need, as of a broadcast, is cheaper copied once into memory that they map. Between cores with a
cache in common "staged" is up to twice as fast, between others less so, or slower.
"""

Rows = npt.NDArray[np.int64]
_Row = tuple[int, ...]
_MEET: _Row = (Row.MEET, 0, 0, 0, 0, 0, 0, 0)
_STAGES = (Where.STAGE_0, Where.STAGE_1)
_RESULTS = (Where.RESULT_0, Where.RESULT_1)

INPUT, OUTPUT = 0, 1
"""Entries of Where.OWN: this rank's buffer, and where its result goes."""


@dataclass(frozen=True)
class Shape:
    """What a program depends on.

    count: elements of the flat buffer that the schedule covers (allgather: of all ranks together).
    stage_bytes: of one staging place.
    """

    rank: int
    size: int
    count: int
    itemsize: int
    root: int = 0
    stage_bytes: int = 1 << 19

    @property
    def nbytes(self) -> int:
        """Return the bytes of the flat buffer."""
        return self.count * self.itemsize


def part(count: int, itemsize: int, size: int, rank: int) -> tuple[int, int]:
    """Return the elements [low, high) that a rank folds: whole cache lines, shared out evenly."""
    line = max(1, LINE_BYTES // itemsize)
    low, high = bounds(-(-count // line), size, rank)
    return min(low * line, count), min(high * line, count)


def _copy(
    target: int, entry: int, offset: int, source: int, origin: int, start: int, nbytes: int
) -> list[_Row]:
    if not nbytes:
        return []
    return [(Row.COPY, target, entry, offset, source, origin, start, nbytes)]


def _fold(target: int, entry: int, offset: int, source: int, start: int, count: int) -> list[_Row]:
    return [(Row.FOLD, target, entry, offset, source, 0, start, count)] if count else []


def _table(rows: list[_Row]) -> Rows:
    return np.array(rows, np.int64).reshape(-1, ROW_WORDS)


# -- collectives that fold ---------------------------------------------------------------------


def allreduce_shared(shape: Shape) -> Rows:
    """Fold this rank's part of all buffers into all of them."""
    low, high = part(shape.count, shape.itemsize, shape.size, shape.rank)
    at = low * shape.itemsize
    return _table([_MEET, *_fold(Where.BUFFERS, ALL, at, Where.BUFFERS, at, high - low), _MEET])


def reduce_shared(shape: Shape) -> Rows:
    """Fold this rank's part of all buffers into root's."""
    low, high = part(shape.count, shape.itemsize, shape.size, shape.rank)
    at = low * shape.itemsize
    fold = _fold(Where.BUFFERS, shape.root, at, Where.BUFFERS, at, high - low)
    return _table([_MEET, *fold, _MEET])


def reduce_scatter_shared(shape: Shape) -> Rows:
    """Fold this rank's piece of all buffers into its result."""
    low, high = bounds(shape.count, shape.size, shape.rank)
    fold = _fold(Where.OWN, OUTPUT, 0, Where.BUFFERS, low * shape.itemsize, high - low)
    return _table([_MEET, *fold, _MEET])


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
    publish = _copy(Where.EAGER, shape.rank, 0, Where.OWN, INPUT, 0, shape.nbytes)
    at = low * shape.itemsize
    fold = _fold(Where.OWN, into, 0, Where.EAGER, at, high - low)
    return _table([*publish, _MEET, *fold])


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
    chunks = list(_chunks(shape.count, shape.stage_bytes // item))
    others = [peer for peer in range(size) if peer != rank]
    keeps = everywhere or rank == shape.root
    rows: list[_Row] = []
    for step in range(len(chunks) + 2):
        if step >= 2 and keeps:
            low, high = chunks[step - 2]
            for peer in others:
                first, last = part(high - low, item, size, peer)
                at, nbytes = (low + first) * item, (last - first) * item
                rows += _copy(Where.OWN, INPUT, at, _RESULTS[step % 2], peer, 0, nbytes)
        if 1 <= step <= len(chunks):
            low, high = chunks[step - 1]
            first, last = part(high - low, item, size, rank)
            result, stage = _RESULTS[(step - 1) % 2], _STAGES[(step - 1) % 2]
            here = (low + first) * item
            rows += _sources(shape, stage, first * item, here)
            if everywhere:
                rows.append(_point(Where.TARGETS, 0, Where.OWN, INPUT, here))
                rows.append(_point(Where.TARGETS, 1, result, rank, 0))
                rows += _fold(Where.TARGETS, PAIR, 0, Where.SOURCES, 0, last - first)
            elif keeps:
                rows += _fold(Where.OWN, INPUT, here, Where.SOURCES, 0, last - first)
            else:
                rows += _fold(result, rank, 0, Where.SOURCES, 0, last - first)
        if step < len(chunks):
            low, high = chunks[step]
            for peer in others:
                first, last = part(high - low, item, size, peer)
                at, nbytes = (low + first) * item, (last - first) * item
                rows += _copy(_STAGES[step % 2], rank, first * item, Where.OWN, INPUT, at, nbytes)
        if step <= len(chunks):
            rows.append(_MEET)
    return _table(rows)


def _sources(shape: Shape, stage: int, staged: int, here: int) -> list[_Row]:
    """Let SOURCES name the same piece: of every peer in its stage, of this rank in its buffer."""
    return [
        _point(Where.SOURCES, peer, Where.OWN, INPUT, here)
        if peer == shape.rank
        else _point(Where.SOURCES, peer, stage, peer, staged)
        for peer in range(shape.size)
    ]


def _point(target: int, entry: int, source: int, origin: int, start: int) -> _Row:
    return (Row.POINT, target, entry, 0, source, origin, start, 0)


def allreduce_cma(shape: Shape) -> Rows:
    """Fold this rank's part of all buffers, chunk by chunk, and write each back while it is hot."""
    item, rank, size = shape.itemsize, shape.rank, shape.size
    low, high = part(shape.count, item, size, rank)
    rows = [_MEET]
    for first, last in _chunks(high - low, _room(shape) // item):
        at, nbytes = (low + first) * item, (last - first) * item
        rows += _read_peers(shape, at, nbytes)
        rows += _fold(Where.OWN, INPUT, at, Where.SOURCES, 0, last - first)
        rows += [
            (Row.WRITE, Where.PEERS, peer, at, Where.OWN, INPUT, at, nbytes)
            for peer in _others(shape)
        ]
    return _table([*rows, _MEET])


def reduce_scatter_cma(shape: Shape) -> Rows:
    """Fold this rank's piece of all buffers into its result."""
    item = shape.itemsize
    low, high = bounds(shape.count, shape.size, shape.rank)
    rows = [_MEET]
    for first, last in _chunks(high - low, _room(shape) // item):
        rows += _read_peers(shape, (low + first) * item, (last - first) * item)
        rows += _fold(Where.OWN, OUTPUT, first * item, Where.SOURCES, 0, last - first)
    return _table([*rows, _MEET])


def _room(shape: Shape) -> int:
    """Return the bytes of each peer's piece that are in this rank's staging place at a time."""
    room = shape.stage_bytes // max(shape.size - 1, 1)
    return max(room // LINE_BYTES * LINE_BYTES, LINE_BYTES)


def _others(shape: Shape) -> list[int]:
    """Return the peers, from the next on, so that not all ranks turn to the same."""
    return [(shape.rank + step) % shape.size for step in range(1, shape.size)]


def _read(target: int, entry: int, offset: int, peer: int, start: int, nbytes: int) -> list[_Row]:
    if not nbytes:
        return []
    return [(Row.READ, target, entry, offset, Where.PEERS, peer, start, nbytes)]


def _read_peers(shape: Shape, at: int, nbytes: int) -> list[_Row]:
    """Copy the same piece of each peer's buffer in, and let SOURCES name it, with the own one."""
    rows: list[_Row] = [_point(Where.SOURCES, shape.rank, Where.OWN, INPUT, at)]
    for place, peer in enumerate(_others(shape)):
        into = place * _room(shape)
        rows += _read(Where.STAGE_0, shape.rank, into, peer, at, nbytes)
        rows.append(_point(Where.SOURCES, peer, Where.STAGE_0, shape.rank, into))
    return rows


def reduce_scatter_staged(shape: Shape) -> Rows:
    """Copy a chunk of every peer's piece in, and fold this rank's."""
    item, size = shape.itemsize, shape.size
    pieces = [bounds(shape.count, size, rank) for rank in range(size)]
    room = shape.stage_bytes // size // LINE_BYTES * LINE_BYTES
    low, high = pieces[shape.rank]
    rows: list[_Row] = []
    for step, (first, _) in enumerate(_chunks(max(b - a for a, b in pieces), room // item)):
        for peer, (start, end) in enumerate(pieces):
            at = min(start + first, end)
            nbytes = (min(at + room // item, end) - at) * item
            if peer != shape.rank:
                rows += _copy(
                    _STAGES[step % 2], shape.rank, peer * room, Where.OWN, INPUT, at * item, nbytes
                )
        rows.append(_MEET)
        at = min(low + first, high)
        count = min(at + room // item, high) - at
        into = (at - low) * item
        rows += _sources(shape, _STAGES[step % 2], shape.rank * room, at * item)
        rows += _fold(Where.OWN, OUTPUT, into, Where.SOURCES, 0, count)
    return _table([*rows, _MEET])


# -- collectives that only move ----------------------------------------------------------------

_Pull = tuple[int, int, int, int]
"""(peer, offset in its buffer, offset in this rank's result, bytes)"""


def _allgather(shape: Shape) -> list[_Pull]:
    row = shape.nbytes // shape.size
    return [(peer, 0, peer * row, row) for peer in range(shape.size)]


def _gather(shape: Shape) -> list[_Pull]:
    return _allgather(shape) if shape.rank == shape.root else []


def _broadcast(shape: Shape) -> list[_Pull]:
    return [] if shape.rank == shape.root else [(shape.root, 0, 0, shape.nbytes)]


def _alltoall(shape: Shape) -> list[_Pull]:
    row = shape.nbytes // shape.size
    return [(peer, shape.rank * row, peer * row, row) for peer in range(shape.size)]


def _barrier(shape: Shape) -> list[_Pull]:
    return []


_PULLS = {
    "barrier": _barrier,
    "allgather": _allgather,
    "gather": _gather,
    "broadcast": _broadcast,
    "alltoall": _alltoall,
}


def own_bytes(name: str, shape: Shape) -> int:
    """Return the bytes of the buffer that this rank shows to the others."""
    if name in ("allgather", "gather"):
        return shape.nbytes // shape.size
    if name == "barrier" or (name == "broadcast" and shape.rank != shape.root):
        return 0
    return shape.nbytes


@functools.lru_cache(maxsize=512)
def shown_bytes(name: str, shape: Shape) -> int:
    """Return the most bytes that any rank shows."""
    size, count, itemsize, root = shape.size, shape.count, shape.itemsize, shape.root
    return max(own_bytes(name, Shape(rank, size, count, itemsize, root)) for rank in (0, root))


def _pull_shared(name: str, shape: Shape) -> Rows:
    rows = [_MEET]
    for peer, start, into, nbytes in _PULLS[name](shape):
        rows += _copy(Where.OWN, OUTPUT, into, Where.BUFFERS, peer, start, nbytes)
    return _table([*rows, _MEET])


def _pull_eager(name: str, shape: Shape) -> Rows:
    rows = _copy(Where.EAGER, shape.rank, 0, Where.OWN, INPUT, 0, own_bytes(name, shape))
    rows.append(_MEET)
    for peer, start, into, nbytes in _PULLS[name](shape):
        rows += _copy(Where.OWN, OUTPUT, into, Where.EAGER, peer, start, nbytes)
    return _table(rows)


def _pull_staged(name: str, shape: Shape) -> Rows:
    """Show a window of the buffer at a time, from which each peer takes what it needs."""
    rows: list[_Row] = []
    mine = own_bytes(name, shape)
    for step, (low, high) in enumerate(_chunks(shown_bytes(name, shape), shape.stage_bytes)):
        stage = _STAGES[step % 2]
        rows += _copy(stage, shape.rank, 0, Where.OWN, INPUT, low, max(min(high, mine) - low, 0))
        rows.append(_MEET)
        for peer, start, into, nbytes in _PULLS[name](shape):
            first, last = max(start, low), min(start + nbytes, high)
            rows += _copy(
                Where.OWN,
                OUTPUT,
                into + first - start,
                stage,
                peer,
                first - low,
                max(last - first, 0),
            )
    return _table([*rows, _MEET])


def _pull_cma(name: str, shape: Shape) -> Rows:
    """Take from each peer's own memory what this rank needs."""
    rows = [_MEET]
    pulls = {peer: pull for peer, *pull in _PULLS[name](shape)}
    for peer in (shape.rank, *_others(shape)):
        if peer in pulls:
            start, into, nbytes = pulls[peer]
            if peer == shape.rank:
                rows += _copy(Where.OWN, OUTPUT, into, Where.OWN, INPUT, start, nbytes)
            else:
                rows += _read(Where.OWN, OUTPUT, into, peer, start, nbytes)
    return _table([*rows, _MEET])


def _chunks(total: int, step: int) -> Iterator[tuple[int, int]]:
    for low in range(0, total, step):
        yield low, min(low + step, total)


_FOLDS: Mapping[str, tuple[Callable[[Shape], Rows], ...]] = {
    "allreduce": (allreduce_shared, allreduce_eager, allreduce_staged, allreduce_cma),
    "reduce": (reduce_shared, reduce_eager, reduce_staged),
    "reduce_scatter": (
        reduce_scatter_shared,
        reduce_scatter_eager,
        reduce_scatter_staged,
        reduce_scatter_cma,
    ),
}

NAMES = (*_FOLDS, *_PULLS)


def shared(name: str, shape: Shape) -> Rows:
    """Return the program for buffers that every rank maps."""
    return _FOLDS[name][0](shape) if name in _FOLDS else _pull_shared(name, shape)


def eager(name: str, shape: Shape) -> Rows:
    """Return the program for buffers of up to EAGER_BYTES, wherever they are."""
    return _FOLDS[name][1](shape) if name in _FOLDS else _pull_eager(name, shape)


def staged(name: str, shape: Shape) -> Rows:
    """Return the program for private buffers."""
    return _FOLDS[name][2](shape) if name in _FOLDS else _pull_staged(name, shape)


def cma(name: str, shape: Shape) -> Rows:
    """Return the program for private buffers of processes that can read each other's memory."""
    return _FOLDS[name][3](shape) if name in _FOLDS else _pull_cma(name, shape)


def private_form(name: str, shape: Shape, reads: bool) -> str:
    """Return the form for private buffers; reads: ranks have access to each other's memory."""
    least = READ_FROM.get(name)
    return "cma" if reads and least is not None and shape.nbytes >= least * shape.size else "staged"


_FORMS: Mapping[str, Callable[[str, Shape], Rows]] = {
    "shared": shared,
    "eager": eager,
    "staged": staged,
    "cma": cma,
}
"""form -> what lowers a collective, by name, to it."""


@functools.lru_cache(maxsize=512)
def lower(form: str, name: str, shape: Shape) -> Rows:
    """Return a program, made once: a new array of a known shape is met in every training step."""
    rows = _FORMS[form](name, shape)
    rows.setflags(write=False)
    return rows
