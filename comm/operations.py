"""Each operation prepared: checked, its buffers viewed, its schedule lowered; ready to run.

A preparation does everything that can go wrong with the arguments, and sends nothing. Running it
moves the messages; a plan runs one preparation many times.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from . import header
from .arithmetic import reduction
from .board import Board
from .buffer import Buffer, allocate, wrap
from .choice import Choice, Chosen
from .chunks import bounds
from .dtypes import DTYPES
from .errors import CommError
from .executor import MOVE, NETWORK_MOVING, NETWORK_WINDOW, WINDOW, Arithmetic, Lane, execute
from .fingerprint import fingerprint, shares_of, tag_of
from .mailboxes import Mailboxes
from .meetings import Meetings
from .memory import Memory, owner_of
from .program import Op, Program
from .schedule import Schedule
from .settings import Settings
from .trace import Signature
from .transport.base import Channel, Transport
from .transport.mpi_compiled import Compiled, InFlight, can_run
from .work import Prepared, Receipt, Steps


@dataclass(frozen=True)
class Plain:
    """A program bound to its memory, without compiled code."""

    run: Callable[[int], Steps]


Executor = Compiled | Plain


class Operations:
    """Prepare operations for one rank of one group."""

    def __init__(self, transport: Transport, settings: Settings) -> None:
        self._transport = transport
        self._settings = settings
        self._rank, self._size = transport.rank, transport.size
        self.choice = Choice(transport.rank, transport.size)
        self._memory: Memory | None = None
        self._meetings: Meetings | None = None
        self._mail: Mailboxes | None = None
        self._closed = False
        self._lacking = ""
        self._compiled = settings.compiled and transport.calls is not None
        self._in_flight = InFlight()
        self._keeps = False

    def keeping(self) -> Operations:
        """Return the same for plans: what it prepares makes its result once, and writes it again.

        A scatter's result, whose shape comes with the message, is new each time.
        """
        keeping = copy.copy(self)
        keeping._keeps = True
        return keeping

    def share(
        self,
        memory: Memory | None,
        board: Board | None,
        mail: Mailboxes | None = None,
        lacking: str = "",
    ) -> None:
        """From now on, use this rank's shared memory: meet on the board, and send by the boxes.

        lacking: why the node shares no memory, for receipts.
        """
        self._memory = memory
        self._lacking = f"; no shared memory: {lacking}" if lacking else ""
        self._meetings = None if board is None else Meetings(board)
        self._mail = mail

    def close(self) -> None:
        """Let go of shared memory; what is prepared from now on is refused when it is to run."""
        self.share(None, None)
        self._closed = True

    # -- collectives -------------------------------------------------------------------------

    def allreduce(
        self, x: Any, op: str = "sum", algorithm: str | Schedule | None = None
    ) -> Prepared:
        buffer = self._wrap(x, writable=True)
        buffer.dtype.require(op)
        if self._meetings and algorithm is None:
            return self._meetings.allreduce(buffer, op)
        return self._reduce_in_place("allreduce", buffer, buffer, op, algorithm, 0)

    def reduce(
        self, x: Any, root: int = 0, op: str = "sum", algorithm: str | Schedule | None = None
    ) -> Prepared:
        root = self.root(root)
        buffer = self._wrap(x, writable=self._rank == root)
        buffer.dtype.require(op)
        if self._meetings and algorithm is None:
            return self._meetings.reduce(buffer, op, root)
        # Only the root's buffer holds a result; elsewhere partial sums are made in a copy.
        inner = buffer if self._rank == root else _copy(buffer)
        return self._reduce_in_place("reduce", buffer, inner, op, algorithm, root)

    def _reduce_in_place(
        self,
        name: str,
        buffer: Buffer,
        inner: Buffer,
        op: str,
        algorithm: str | Schedule | None,
        root: int,
    ) -> Prepared:
        flat, dtype = inner.flat, inner.dtype
        chosen = self.choice.choose(name, flat.size, dtype, algorithm, root)
        how = reduction(chosen.program, flat, dtype, op, self._size, chosen.raw_reduce)
        executor = self._executor(how.program, how.work, how.work, how.arithmetic)

        def run(tag: int) -> Steps:
            if inner is buffer:
                buffer.stage()
            else:
                np.copyto(flat, buffer.view.reshape(-1))
            how.begin()
            yield from executor.run(tag)
            if inner is buffer:
                how.finish()
                buffer.commit()
            return buffer.owner

        peer = -1 if name == "allreduce" else root
        signature = Signature(name, op, dtype.name, flat.size, peer)
        return self._prepared(signature, chosen, flat.nbytes, run, executor)

    def reduce_scatter(
        self, x: Any, op: str = "sum", algorithm: str | Schedule | None = None
    ) -> Prepared:
        buffer = self._wrap(x, writable=False)
        dtype = buffer.dtype
        dtype.require(op)
        if self._meetings and algorithm is None:
            return self._meetings.reduce_scatter(buffer, op)
        inner = _copy(buffer)
        chosen = self.choice.choose("reduce_scatter", inner.flat.size, dtype, algorithm, 0)
        how = reduction(chosen.program, inner.flat, dtype, op, self._size, chosen.raw_reduce)
        executor = self._executor(how.program, how.work, how.work, how.arithmetic)
        low, high = bounds(inner.flat.size, self._size, self._rank)

        def run(tag: int) -> Steps:
            np.copyto(inner.flat, buffer.view.reshape(-1))
            how.begin()
            yield from executor.run(tag)
            how.finish()
            result = buffer.like((high - low,))
            wrap(result, writable=True).flat[...] = inner.flat[low:high]
            return result

        signature = Signature("reduce_scatter", op, dtype.name, inner.flat.size)
        return self._prepared(signature, chosen, inner.flat.nbytes, run, executor)

    def broadcast(self, x: Any, root: int = 0, algorithm: str | Schedule | None = None) -> Prepared:
        root = self.root(root)
        buffer = self._wrap(x, writable=self._rank != root)
        if self._meetings and algorithm is None:
            return self._meetings.broadcast(buffer, root)
        chosen = self.choice.choose("broadcast", buffer.flat.size, buffer.dtype, algorithm, root)
        executor = self._executor(chosen.program, buffer.flat, buffer.flat)

        def run(tag: int) -> Steps:
            buffer.stage()
            yield from executor.run(tag)
            if self._rank != root:
                buffer.commit()
            return buffer.owner

        signature = Signature("broadcast", "", buffer.dtype.name, buffer.flat.size, root)
        return self._prepared(signature, chosen, buffer.flat.nbytes, run, executor)

    def allgather(self, x: Any, algorithm: str | Schedule | None = None) -> Prepared:
        buffer = self._wrap(x, writable=False)
        if self._meetings and algorithm is None:
            return self._meetings.allgather(buffer)
        count = buffer.flat.size
        chosen = self.choice.choose("allgather", count * self._size, buffer.dtype, algorithm, 0)

        def run(tag: int) -> Steps:
            buffer.stage()
            result = buffer.like((self._size, *buffer.shape))
            flat = wrap(result, writable=True).flat
            flat[self._rank * count : (self._rank + 1) * count] = buffer.flat
            yield from self._executor(chosen.program, flat, flat).run(tag)
            return result

        signature = Signature("allgather", "", buffer.dtype.name, buffer.flat.size)
        return self._prepared(signature, chosen, buffer.flat.nbytes * self._size, run)

    def gather(self, x: Any, root: int = 0, algorithm: str | Schedule | None = None) -> Prepared:
        root = self.root(root)
        buffer = self._wrap(x, writable=False)
        if self._meetings and algorithm is None:
            return self._meetings.gather(buffer, root)
        count = buffer.flat.size
        chosen = self.choice.choose("gather", count * self._size, buffer.dtype, algorithm, root)

        def run(tag: int) -> Steps:
            buffer.stage()
            # Ranks below the root may collect a subtree's parts on the way; memory that is never
            # touched costs nothing.
            result = buffer.like((self._size, *buffer.shape))
            flat = wrap(result, writable=True).flat
            flat[self._rank * count : (self._rank + 1) * count] = buffer.flat
            yield from self._executor(chosen.program, flat, flat).run(tag)
            return result if self._rank == root else None

        signature = Signature("gather", "", buffer.dtype.name, buffer.flat.size, root)
        return self._prepared(signature, chosen, buffer.flat.nbytes * self._size, run)

    def scatter(
        self, x: Any = None, root: int = 0, algorithm: str | Schedule | None = None
    ) -> Prepared:
        root = self.root(root)
        words = np.zeros(header.NBYTES, np.uint8)
        buffer = None
        if self._rank == root:
            buffer = self._wrap(x, writable=False)
            self._require_rows(buffer)
            header.write(words, buffer)
        announce = self.choice.choose("broadcast", words.size, DTYPES["uint8"], None, root)
        name = algorithm if algorithm is not None else "tree"
        # Judged and named now, lowered once its count is known.
        judged = self.choice.choose("scatter", 0, DTYPES["uint8"], name, root)

        def run(tag: int) -> Steps:
            yield from self._executor(announce.program, words, words).run(tag)
            family, dtype, shape = header.read(words)
            count = int(np.prod(shape, dtype=np.int64))
            chosen = self.choice.choose("scatter", count * self._size, dtype, name, root)
            if buffer is None:
                result = allocate(family, shape, dtype)
                flat = np.empty(count * self._size, dtype.storage)
            else:
                buffer.stage()
                result = buffer.like(shape)
                flat = buffer.flat
            yield from self._executor(chosen.program, flat, flat).run(tag)
            own = flat[self._rank * count : (self._rank + 1) * count]
            wrap(result, writable=True).flat[...] = own
            return result

        nbytes = 0 if buffer is None else buffer.flat.nbytes
        reason = "scatter announces its shape first"
        shown = replace(announce, algorithm=judged.algorithm, digest=judged.digest, reason=reason)
        signature = Signature("scatter", "", "", 0, root)
        if buffer is not None:
            signature = Signature("scatter", "", buffer.dtype.name, buffer.flat.size, root)
        return self._prepared(signature, shown, nbytes, run)

    def alltoall(self, x: Any, algorithm: str | Schedule | None = None) -> Prepared:
        buffer = self._wrap(x, writable=False)
        self._require_rows(buffer)
        if self._meetings and algorithm is None:
            return self._meetings.alltoall(buffer)
        count = buffer.flat.size
        row = count // self._size
        chosen = self.choice.choose("alltoall", count, buffer.dtype, algorithm, 0)

        def run(tag: int) -> Steps:
            buffer.stage()
            result = buffer.like(buffer.shape)
            flat = wrap(result, writable=True).flat
            own = slice(self._rank * row, (self._rank + 1) * row)
            flat[own] = buffer.flat[own]
            yield from self._executor(chosen.program, buffer.flat, flat).run(tag)
            return result

        signature = Signature("alltoall", "", buffer.dtype.name, buffer.flat.size)
        return self._prepared(signature, chosen, buffer.flat.nbytes, run)

    def barrier(self) -> Prepared:
        if self._meetings:
            return self._meetings.barrier()
        token = np.zeros(1, np.uint8)
        chosen = self._token()
        executor = self._executor(chosen.program, token, token)
        return self._prepared(Signature("barrier"), chosen, 0, executor.run, executor)

    def coming(self, name: str) -> Callable[[int], Steps]:
        """Return what waits for all ranks in what MPI waits for in the end, for ever and unwatched.

        It is given a number, which tells the messages of such calls apart, not the count of all
        collectives: ranks that have lost count of these, by an error, meet here nevertheless. No
        kernel is needed.
        """
        chosen = self._token()
        mark = fingerprint(Signature(name), chosen.way)

        def run(number: int) -> Steps:
            token = np.zeros(1, np.uint8)
            tag = tag_of(number, mark, shares_of(self._transport.max_tag))
            return execute(chosen.program, self._lane(tag), token, token)

        return run

    def come(self, name: str, steps: Callable[[], Steps]) -> Prepared:
        """Prepare to come together by such steps."""
        return self._prepared(Signature(name), self._token(), 0, lambda _: steps())

    def _token(self) -> Chosen:
        return self.choice.choose("barrier", 1, DTYPES["uint8"], None, 0)

    # -- point to point ----------------------------------------------------------------------

    def send(self, x: Any, dst: int, tag: int = 0) -> Prepared:
        buffer, dst, tag = self._wrap(x, writable=False), self.peer(dst, "dst"), self.tag(tag)
        if self._mail and self._mail.reaches(dst):
            return self._mail.send(buffer, dst, tag)
        return self._message("send", Op.SEND, buffer, dst, tag)

    def recv(self, x: Any, src: int, tag: int = 0) -> Prepared:
        buffer, src, tag = self._wrap(x, writable=True), self.peer(src, "src"), self.tag(tag)
        if self._mail and self._mail.reaches(src):
            return self._mail.recv(buffer, src, tag)
        return self._message("recv", Op.RECV, buffer, src, tag)

    @property
    def mail(self) -> Mailboxes | None:
        """Return this rank's messages through shared memory."""
        return self._mail

    def by_mail(self, peer: int) -> bool:
        """Tell whether messages to and from a peer pass through shared memory."""
        return self._mail is not None and self._mail.reaches(peer)

    def _message(self, name: str, op: Op, buffer: Buffer, peer: int, tag: int) -> Prepared:
        transport = self._transport
        data = buffer.flat.view(np.uint8)
        limit = self._settings.max_message_bytes
        start = transport.isend if op is Op.SEND else transport.irecv

        def run(_: int) -> Steps:
            buffer.stage()
            # All pieces at once, in the caller's order: the pieces of two messages with the same
            # tag must not interleave. A message of no bytes is a message.
            pending = [
                start(data[low : low + limit], peer, tag, Channel.POINT_TO_POINT)
                for low in range(0, max(data.size, 1), limit)
            ]
            while pending := [request for request in pending if not request.done()]:
                yield pending
            if op is Op.RECV:
                buffer.commit()
            return buffer.owner

        receipt = Receipt(name, "message", transport.name, 1, data.size, self._lacking[2:])
        signature = Signature(name, "", buffer.dtype.name, buffer.flat.size, peer)
        return Prepared(receipt, Channel.POINT_TO_POINT, run, signature)

    # -- how they run, and checks --------------------------------------------------------------

    def _prepared(
        self,
        signature: Signature,
        chosen: Chosen,
        nbytes: int,
        run: Callable[[int], Steps],
        executor: Executor | None = None,
    ) -> Prepared:
        """executor: what `run` runs, once, where that is known before."""
        receipt = Receipt(
            signature.operation,
            chosen.algorithm,
            f"{self._transport.name}-compiled" if self._compiled else self._transport.name,
            chosen.schedule.num_chunks,
            nbytes,
            chosen.reason + self._lacking,
        )
        way = chosen.way
        mark = fingerprint(signature, way)
        note = executor.note if isinstance(executor, Compiled) else None
        return Prepared(receipt, Channel.COLLECTIVE, run, signature, way=way, mark=mark, note=note)

    def _executor(
        self,
        program: Program,
        source: npt.NDArray[Any],
        target: npt.NDArray[Any],
        arithmetic: Arithmetic = MOVE,
    ) -> Executor:
        """Bind a program to its memory."""
        if self._compiled and can_run(self._transport.calls, program, arithmetic):
            lane = self._lane(0)
            return Compiled(program, lane, source, target, arithmetic, self._in_flight)
        return Plain(lambda tag: execute(program, self._lane(tag), source, target, arithmetic))

    def _lane(self, tag: int) -> Lane:
        settings = self._settings
        segment = min(settings.segment_bytes, settings.max_message_bytes)
        windows = (WINDOW, WINDOW)
        if self.choice.spans_nodes:
            windows = (NETWORK_WINDOW, NETWORK_MOVING)
        kept = self._in_flight.abandoned
        return Lane(self._transport, Channel.COLLECTIVE, tag, segment, *windows, kept)

    def _wrap(self, x: Any, writable: bool) -> Buffer:
        """View x, and refuse shared memory that is not this communicator's, or used in strides."""
        buffer = wrap(x, writable=writable, keeps=self._keeps)
        memory = owner_of(int(buffer.view.__array_interface__["data"][0]))
        foreign = memory is not None and memory is not self._memory and not self._closed
        if foreign and buffer.view.size:
            raise CommError(
                "x: memory from empty() of another communicator, whose ranks do not map it for "
                "this one; pass it on the communicator it is from, or on a group split from that"
            )
        if memory is not None and buffer.staged:
            raise ValueError(
                f"x: a view of shape {buffer.view.shape} with strides {buffer.view.strides} bytes "
                "of memory from empty() is not contiguous, or not aligned to its elements, so it "
                "cannot be shared; pass a copy"
            )
        return buffer

    @property
    def way(self) -> str:
        """Return how collectives go from rank to rank where the caller names no algorithm."""
        return "shared" if self._meetings else self._transport.name

    def root(self, root: int) -> int:
        """Return a rank of this group, or raise ValueError."""
        return self.peer(root, "root")

    def peer(self, rank: int, what: str) -> int:
        """Return a rank of this group, or raise ValueError that calls it what it is."""
        rank = operator.index(rank)
        if not 0 <= rank < self._size:
            raise ValueError(
                f"{what} {rank} is outside 0..{self._size - 1}, the ranks of this group"
            )
        return rank

    def tag(self, tag: int) -> int:
        """Return a tag that every message can have, or raise ValueError."""
        tag = operator.index(tag)
        if not 0 <= tag <= self._transport.max_tag:
            raise ValueError(f"tag {tag} is outside 0..{self._transport.max_tag}")
        return tag

    def _require_rows(self, buffer: Buffer) -> None:
        if not buffer.shape or buffer.shape[0] != self._size:
            raise ValueError(
                f"x: expected a first axis of {self._size}, a row per rank, got shape "
                f"{buffer.shape}"
            )


def _copy(buffer: Buffer) -> Buffer:
    """Return a private buffer of the same shape, holding nothing yet."""
    memory = np.empty(buffer.shape, buffer.flat.dtype)
    return Buffer(memory, memory, memory.reshape(-1), buffer.dtype, "numpy")
