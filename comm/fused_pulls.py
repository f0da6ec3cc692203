"""Collectives that only move, over shared memory: each form of all of them, as rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from ..kernels.records import Where
from .fused_rows import (
    INPUT,
    MEET,
    OUTPUT,
    PAUSE,
    STAGES,
    OneRow,
    Rows,
    Shape,
    chunks_of,
    copied,
    fetched,
    others_of,
    table,
)

_Pull = tuple[int, int, int, int]
"""(peer, offset in its buffer, offset in this rank's result, bytes)"""


def _allgather(shape: Shape) -> list[_Pull]:
    row = shape.nbytes // shape.size
    return [(peer, 0, peer * row, row) for peer in range(shape.size)]


def _gather(shape: Shape) -> list[_Pull]:
    return _allgather(shape) if shape.rank == shape.root else []


def _broadcast(shape: Shape) -> list[_Pull]:
    return [] if shape.rank == shape.root else [(shape.root, 0, 0, shape.nbytes)]


def _scatter(shape: Shape) -> list[_Pull]:
    row = shape.nbytes // shape.size
    return [(shape.root, shape.rank * row, 0, row)]


def _alltoall(shape: Shape) -> list[_Pull]:
    row = shape.nbytes // shape.size
    return [(peer, shape.rank * row, peer * row, row) for peer in range(shape.size)]


def _barrier(shape: Shape) -> list[_Pull]:
    return []


PULLS = {
    "barrier": _barrier,
    "allgather": _allgather,
    "gather": _gather,
    "broadcast": _broadcast,
    "scatter": _scatter,
    "alltoall": _alltoall,
}


def own_bytes(name: str, shape: Shape) -> int:
    """Return the bytes of the buffer that this rank shows to the others."""
    if name in ("allgather", "gather"):
        return shape.nbytes // shape.size
    if name == "barrier" or (name in ("broadcast", "scatter") and shape.rank != shape.root):
        return 0
    return shape.nbytes


@functools.lru_cache(maxsize=512)
def shown_bytes(name: str, shape: Shape) -> int:
    """Return the most bytes that any rank shows."""
    size, count, itemsize, root = shape.size, shape.count, shape.itemsize, shape.root
    return max(own_bytes(name, Shape(rank, size, count, itemsize, root)) for rank in (0, root))


def pull_shared(name: str, shape: Shape) -> Rows:
    rows = [MEET]
    for peer, start, into, nbytes in PULLS[name](shape):
        rows += copied(Where.OWN, OUTPUT, into, Where.BUFFERS, peer, start, nbytes)
    return table([*rows, MEET])


def pull_eager(name: str, shape: Shape) -> Rows:
    rows = copied(Where.EAGER, shape.rank, 0, Where.OWN, INPUT, 0, own_bytes(name, shape))
    rows.append(MEET)
    for peer, start, into, nbytes in PULLS[name](shape):
        rows += copied(Where.OWN, OUTPUT, into, Where.EAGER, peer, start, nbytes)
    return table(rows)


def announced(shape: Shape) -> Rows:
    """Show everybody what the root says, and pause until the rest is lowered for that."""
    return table([*map(tuple, pull_eager("broadcast", shape).tolist()), PAUSE])


def pull_staged(name: str, shape: Shape) -> Rows:
    """Show a window of the buffer at a time, from which each peer takes what it needs."""
    rows: list[OneRow] = []
    mine = own_bytes(name, shape)
    for step, (low, high) in enumerate(chunks_of(shown_bytes(name, shape), shape.stage_bytes)):
        stage = STAGES[step % 2]
        rows += copied(stage, shape.rank, 0, Where.OWN, INPUT, low, max(min(high, mine) - low, 0))
        rows.append(MEET)
        for peer, start, into, nbytes in PULLS[name](shape):
            first, last = max(start, low), min(start + nbytes, high)
            rows += copied(
                Where.OWN,
                OUTPUT,
                into + first - start,
                stage,
                peer,
                first - low,
                max(last - first, 0),
            )
    return table([*rows, MEET])


def pull_cma(name: str, shape: Shape) -> Rows:
    """Take from each peer's own memory what this rank needs."""
    rows = [MEET]
    pulls = {peer: pull for peer, *pull in PULLS[name](shape)}
    for peer in (shape.rank, *others_of(shape)):
        if peer in pulls:
            start, into, nbytes = pulls[peer]
            if peer == shape.rank:
                rows += copied(Where.OWN, OUTPUT, into, Where.OWN, INPUT, start, nbytes)
            else:
                rows += fetched(Where.OWN, OUTPUT, into, peer, start, nbytes)
    return table([*rows, MEET])


PULLED: Mapping[str, Callable[[str, Shape], Rows]] = {
    "shared": pull_shared,
    "eager": pull_eager,
    "staged": pull_staged,
    "cma": pull_cma,
}
"""form, see `comm.fused` -> what lowers one of PULLS, by name, to it."""
