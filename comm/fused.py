"""Lower a collective to one rank's program over shared memory: pairwise, its rounds fused.

Where all ranks map each other's memory, what the pairwise schedule sends in size - 1 rounds is read
in one pass between two meetings. There are four forms:

shared: the buffers themselves are mapped.  Everybody comes, each rank does its part of the work in
place, everybody is done.
eager: up to EAGER_BYTES are copied to a place of this rank's in the shared memory, and read from
there by all after one meeting.  Two places are used by turns, so that nobody waits to write.
staged: larger private buffers pass through cache-sized places, chunk by chunk.
cma: larger private buffers where processes have access to each other's memory (`comm.cma`): a rank
reads there what it needs, what it folds a cache-sized chunk at a time; an allreduce writes the
result back to all, the others write nothing.

Pure functions; addresses come in when a program is bound to a group (`comm.board`).
"""

from __future__ import annotations

from collections.abc import Mapping

from .byte_cache import ByteCache
from .fused_folds import FOLDS
from .fused_pulls import PULLED, PULLS, announced
from .fused_rows import Rows, Shape

__all__ = ["NAMES", "announced", "lower", "private_form"]

EAGER_BYTES = 8 << 10

READ_FROM: Mapping[str, int] = {
    "allreduce": 4 << 20,
    "reduce_scatter": 4 << 20,
    "allgather": 0,
    "gather": 0,
    "scatter": 64 << 10,
    "alltoall": 0,
}
"""Bytes of the flat buffer for each rank from which on a collective takes the form "cma".

Measured on 2 and 4 ranks. Copying within the kernel has a cost for every page, and what all peers
need, as of a broadcast, is cheaper copied once into memory that they map. Between cores with a
cache in common "staged" is up to twice as fast, between others less so, or slower.
"""

NAMES = (*FOLDS, *PULLS)


def private_form(name: str, shape: Shape, reads: bool) -> str:
    """Return the form for private buffers; reads: ranks have access to each other's memory."""
    least = READ_FROM.get(name)
    return "cma" if reads and least is not None and shape.nbytes >= least * shape.size else "staged"


def _lowered(form: str, name: str, shape: Shape) -> Rows:
    rows = FOLDS[name][form](shape) if name in FOLDS else PULLED[form](name, shape)
    rows.setflags(write=False)
    return rows


lower = ByteCache(_lowered, 16 << 20)
"""(form, name, shape) -> the program, made once: every training step has new arrays of old shapes.

By bytes: that of a small array has some hundred, of a gigabyte on 64 ranks 25 million.
"""
