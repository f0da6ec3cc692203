"""Prepare operations as messages of a transport: collectives by schedules, and single messages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from . import header
from .arithmetic import reduction
from .buffer import Buffer, allocate, wrap
from .choice import Choice, Chosen
from .chunks import bounds, pieces
from .dtypes import DTYPES, DType
from .errors import MismatchError
from .executor import MOVE, NETWORK_MOVING, NETWORK_WINDOW, WINDOW, Arithmetic, Route, execute
from .fingerprint import fingerprint, shares_of, tag_of
from .posts import Posts
from .program import Op, Program
from .schedule import Schedule
from .settings import Settings
from .trace import Signature
from .transport.base import Channel, Receiving, Request, Transport
from .transport.mpi_compiled import Compiled, InFlight, can_run
from .work import Prepared, Receipt, Steps

__all__ = ["Messaging"]


@dataclass(frozen=True)
class Plain:
    """A program bound to its memory, without compiled code."""

    run: Callable[[int], Steps]


Executor = Compiled | Plain


class Messaging:
    """Prepare operations for one rank of one group; as `Meetings` does, which needs a board.

    choice: of the schedules.  posts: the messages between two ranks.
    """

    def __init__(self, transport: Transport, settings: Settings) -> None:
        self._transport = transport
        self._settings = settings
        self._rank, self._size = transport.rank, transport.size
        self.choice = Choice(transport.rank, transport.size)
        self._lacking = ""
        self._algorithm: str | Schedule | None = None
        self._compiled = settings.compiled and transport.calls is not None
        self._in_flight = InFlight()
        self.posts = Posts(transport.rank)

    def lack(self, reason: str) -> None:
        """Say in receipts why the node shares no memory; "" where it does, or is not asked to."""
        self._lacking = f"no shared memory: {reason}" if reason else ""

    def by(self, algorithm: str | Schedule | None) -> Messaging:
        """Return the same, with an algorithm that the caller has named."""
        if algorithm is None:
            return self
        named = copy.copy(self)
        named._algorithm = algorithm
        return named

    def allreduce(self, buffer: Buffer, op: str) -> Prepared:
        return self._reduce_in_place("allreduce", buffer, buffer, op, 0)

    def reduce(self, buffer: Buffer, op: str, root: int) -> Prepared:
        # Only the root's buffer holds a result; elsewhere partial sums are made in a copy.
        inner = buffer if self._rank == root else _copy(buffer)
        return self._reduce_in_place("reduce", buffer, inner, op, root)

    def reduce_scatter(self, buffer: Buffer, op: str) -> Prepared:
        dtype = buffer.dtype
        inner = _copy(buffer)
        chosen = self._choose("reduce_scatter", inner.flat.size, dtype)
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

    def broadcast(self, buffer: Buffer, root: int) -> Prepared:
        chosen = self._choose("broadcast", buffer.flat.size, buffer.dtype, root)
        executor = self._executor(chosen.program, buffer.flat, buffer.flat)

        def run(tag: int) -> Steps:
            buffer.stage()
            yield from executor.run(tag)
            if self._rank != root:
                buffer.commit()
            return buffer.owner

        signature = Signature("broadcast", "", buffer.dtype.name, buffer.flat.size, root)
        return self._prepared(signature, chosen, buffer.flat.nbytes, run, executor)

    def allgather(self, buffer: Buffer) -> Prepared:
        return self._collect("allgather", buffer)

    def gather(self, buffer: Buffer, root: int) -> Prepared:
        return self._collect("gather", buffer, root)

    def scatter(self, buffer: Buffer | None, root: int) -> Prepared:
        """buffer: the root's; None elsewhere."""
        words = np.zeros(header.NBYTES, np.uint8)
        if buffer is not None:
            header.write(words, buffer)
        announce = self.choice.choose("broadcast", words.size, DTYPES["uint8"], None, root)
        name = self._algorithm if self._algorithm is not None else "tree"
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

    def alltoall(self, buffer: Buffer) -> Prepared:
        count = buffer.flat.size
        row = count // self._size
        chosen = self._choose("alltoall", count, buffer.dtype)

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
        # Of several chunks the one that has the token tells that all have come, as each would. What
        # it says is of no interest, so nothing is added, for which there would have to be a kernel.
        token, came = np.zeros((2, 1), np.uint8)
        chosen = self._choose("barrier", 1, DTYPES["uint8"])
        executor = self._executor(chosen.program.moving, token, came)
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
            return execute(chosen.program, self._route(tag), token, token)

        return run

    def come(self, name: str, steps: Callable[[], Steps]) -> Prepared:
        """Prepare to come together by such steps."""
        return self._prepared(Signature(name), self._token(), 0, lambda _: steps())

    def _choose(self, name: str, count: int, dtype: DType, root: int = 0) -> Chosen:
        return self.choice.choose(name, count, dtype, self._algorithm, root)

    def _token(self) -> Chosen:
        return self.choice.choose("barrier", 1, DTYPES["uint8"], None, 0)

    def send(self, buffer: Buffer, dst: int, tag: int) -> Prepared:
        return self._message("send", Op.SEND, buffer, dst, tag)

    def recv(self, buffer: Buffer, src: int, tag: int) -> Prepared:
        return self._message("recv", Op.RECV, buffer, src, tag)

    def _message(self, name: str, op: Op, buffer: Buffer, peer: int, tag: int) -> Prepared:
        transport = self._transport
        data = buffer.flat.view(np.uint8)
        limit = self._settings.max_message_bytes

        def send(low: int, high: int) -> Request:
            return transport.isend(data[low:high], peer, tag, Channel.POINT_TO_POINT)

        def recv(low: int, high: int) -> Receiving:
            return transport.irecv(data[low:high], peer, tag, Channel.POINT_TO_POINT)

        def run(_: int) -> Steps:
            buffer.stage()
            spans = pieces(data.size, limit)
            try:
                if op is Op.SEND:
                    yield from self.posts.send(send, spans, buffer)
                else:
                    yield from self.posts.receive(recv, spans, peer, tag, buffer)
            except MismatchError as error:
                told = f"; a {name} of {data.size} bytes, in pieces of {limit}"
                raise MismatchError(f"{error}{told if data.size >= limit else ''}") from None
            if op is Op.RECV:
                buffer.commit()
            return buffer.owner

        receipt = Receipt(name, "message", transport.name, 1, data.size, self._lacking)
        signature = Signature(name, "", buffer.dtype.name, buffer.flat.size, peer)
        return Prepared(receipt, Channel.POINT_TO_POINT, run, signature)

    def _collect(self, name: str, buffer: Buffer, root: int = -1) -> Prepared:
        """root: whose result it is; without, every rank's."""
        count = buffer.flat.size
        chosen = self._choose(name, count * self._size, buffer.dtype, max(root, 0))

        def run(tag: int) -> Steps:
            buffer.stage()
            # Ranks below a root may collect a subtree's parts on the way; memory that is never
            # touched costs nothing.
            result = buffer.like((self._size, *buffer.shape))
            flat = wrap(result, writable=True).flat
            flat[self._rank * count : (self._rank + 1) * count] = buffer.flat
            yield from self._executor(chosen.program, flat, flat).run(tag)
            return result if root in (-1, self._rank) else None

        signature = Signature(name, "", buffer.dtype.name, buffer.flat.size, root)
        return self._prepared(signature, chosen, buffer.flat.nbytes * self._size, run)

    def _reduce_in_place(
        self, name: str, buffer: Buffer, inner: Buffer, op: str, root: int
    ) -> Prepared:
        """inner: what is reduced, the buffer itself or a copy whose end is nobody's result."""
        flat, dtype = inner.flat, inner.dtype
        chosen = self._choose(name, flat.size, dtype, root)
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
            f"{chosen.reason}; {self._lacking}" if self._lacking else chosen.reason,
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
            route = self._route(0)
            return Compiled(program, route, source, target, arithmetic, self._in_flight)
        return Plain(lambda tag: execute(program, self._route(tag), source, target, arithmetic))

    def _route(self, tag: int) -> Route:
        settings = self._settings
        segment = min(settings.segment_bytes, settings.max_message_bytes)
        windows = (WINDOW, WINDOW)
        if self.choice.spans_nodes:
            windows = (NETWORK_WINDOW, NETWORK_MOVING)
        kept = self._in_flight.abandoned
        return Route(self._transport, Channel.COLLECTIVE, tag, segment, *windows, kept)


def _copy(buffer: Buffer) -> Buffer:
    """Return a private buffer of the same shape, holding nothing yet."""
    memory = np.empty(buffer.shape, buffer.flat.dtype)
    return Buffer(memory, memory, memory.reshape(-1), buffer.dtype, "numpy")
