"""Prepare collectives as meetings on a board, instead of messages."""

from __future__ import annotations

from typing import Any

from .arithmetic import divisors
from .board import Board
from .buffer import Buffer, address_in, address_of
from .call_codes import code_of
from .dtypes import DType
from .meeting import Call, Meeting
from .scattering import Scattering
from .trace import Signature
from .work import Prepared, Receipt, Steps

_FORMS = {
    "shared": "all buffers are in shared memory",
    "eager": "small buffers are copied for everybody",
    "cma": "private buffers are read where they are",
    "staged": "private buffers pass through shared memory",
    "told": "the root says how its buffer is read",
}

_WRITES = "private buffers are read and written where they are"
"""Of the one operation that, in the form "cma", writes to the memory of others."""


class Meetings:
    """Prepare operations for one rank of a group that has a board."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._rank, self._size = board.rank, board.size

    def allreduce(self, buffer: Buffer, op: str) -> Prepared:
        return self._in_place("allreduce", buffer, op, 0, written=True)

    def reduce(self, buffer: Buffer, op: str, root: int) -> Prepared:
        return self._in_place("reduce", buffer, op, root, written=self._rank == root)

    def broadcast(self, buffer: Buffer, root: int) -> Prepared:
        return self._in_place("broadcast", buffer, "", root, written=self._rank != root)

    def reduce_scatter(self, buffer: Buffer, op: str) -> Prepared:
        count = buffer.flat.size
        own = -(-(count - self._rank) // self._size)
        return self._anew("reduce_scatter", buffer, count, (own,), op)

    def allgather(self, buffer: Buffer) -> Prepared:
        shape = (self._size, *buffer.shape)
        count = buffer.flat.size * self._size
        return self._anew("allgather", buffer, count, shape)

    def gather(self, buffer: Buffer, root: int) -> Prepared:
        shape = (self._size, *buffer.shape) if self._rank == root else None
        return self._anew("gather", buffer, buffer.flat.size * self._size, shape, root=root)

    def scatter(self, buffer: Buffer | None, root: int) -> Prepared:
        """buffer: the root's; None elsewhere."""
        meeting = Scattering(self._board, root, buffer)

        def run(_: int) -> Steps:
            if buffer is not None:
                buffer.stage()
            yield from meeting.steps(buffer)
            return meeting.take()

        signature, nbytes, plain = Signature("scatter", "", "", 0, root), 0, True
        if buffer is not None:
            nbytes, plain = buffer.flat.nbytes, not buffer.staged
            signature = Signature("scatter", "", buffer.dtype.name, buffer.flat.size, root)
        owner, receipt = None if buffer is None else buffer.owner, self._receipt(meeting, nbytes)
        return Prepared(receipt, None, run, signature, meeting, plain, owner, take=meeting.take)

    def alltoall(self, buffer: Buffer) -> Prepared:
        return self._anew("alltoall", buffer, buffer.flat.size, buffer.shape)

    def barrier(self) -> Prepared:
        call = Call("barrier", code_of("barrier", "", "uint8"), self._board.shape(0, 1, 0), 0, 0)
        meeting = Meeting(self._board, call)

        def run(_: int) -> Steps:
            yield from meeting.steps()

        signature = Signature("barrier")
        return Prepared(self._receipt(meeting, 0), None, run, signature, meeting, plain=True)

    def _in_place(self, name: str, buffer: Buffer, op: str, root: int, written: bool) -> Prepared:
        meeting = self._meeting(name, buffer, buffer.flat.size, op, root)

        def run(_: int) -> Steps:
            buffer.stage()
            yield from meeting.steps(buffer)
            if written:
                buffer.commit()
            return buffer.owner

        receipt = self._receipt(meeting, buffer.flat.nbytes)
        peer = -1 if name == "allreduce" else root
        signature = Signature(name, op, buffer.dtype.name, buffer.flat.size, peer)
        plain = not buffer.staged
        return Prepared(receipt, None, run, signature, meeting, plain, buffer.owner)

    def _anew(
        self,
        name: str,
        buffer: Buffer,
        count: int,
        shape: tuple[int, ...] | None,
        op: str = "",
        root: int = 0,
    ) -> Prepared:
        """shape: of this rank's result; None where it has none."""
        meeting = self._meeting(name, buffer, count, op, root)
        new = buffer.maker

        def make() -> Any:
            if shape is None:
                return None
            result = new(shape)
            meeting.result_at(address_in(result))
            return result

        def run(_: int) -> Steps:
            buffer.stage()
            result = make()
            yield from meeting.steps((buffer, result))
            return result

        nbytes = count * buffer.dtype.itemsize
        peer = root if name == "gather" else -1
        signature = Signature(name, op, buffer.dtype.name, buffer.flat.size, peer)
        receipt, plain = self._receipt(meeting, nbytes), not buffer.staged
        return Prepared(receipt, None, run, signature, meeting, plain, buffer.owner, make)

    def _meeting(self, name: str, buffer: Buffer, count: int, op: str, root: int) -> Meeting:
        dtype, fold, before, after = buffer.dtype, 0, 1.0, 1.0
        if op:
            fold, before, after = folding(op, dtype, self._size)
        shape = self._board.shape(count, dtype.itemsize, root)
        code = code_of(name, op, dtype.name)
        where = address_of(buffer.flat), buffer.flat.nbytes
        return Meeting(self._board, Call(name, code, shape, *where, fold, before, after))

    def _receipt(self, meeting: Meeting, nbytes: int) -> Receipt:
        writes = (meeting.form, meeting.name) == ("cma", "allreduce")
        reason = _WRITES if writes else _FORMS[meeting.form]
        return Receipt(
            meeting.name, f"pairwise, {meeting.form}", "shared", self._size, nbytes, reason
        )


def folding(op: str, dtype: DType, size: int) -> tuple[int, float, float]:
    """Return the compiled fold of an op on a type, and its divisors; see arithmetic.reduction."""
    from ..kernels.fold import fold_callback

    return fold_callback(op, dtype.name), *divisors(op, dtype, size)
