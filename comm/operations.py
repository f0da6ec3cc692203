"""Each operation prepared: checked, its buffers viewed, its way chosen; ready to run.

A preparation does everything that can go wrong with the arguments, and sends nothing. Running it
moves the messages; a plan runs one preparation many times.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .arguments import whole
from .board import Board
from .buffer import Buffer, wrap
from .choice import Choice
from .errors import CommError
from .mailboxes import Mailboxes
from .meetings import Meetings
from .memory import Memory, owner_of
from .messaging import Messaging
from .posts import Posts
from .schedule import Algorithm
from .settings import Settings
from .transport.base import Transport
from .work import Prepared, Steps


class Operations:
    """Prepare operations for one rank of one group."""

    def __init__(self, transport: Transport, settings: Settings) -> None:
        self._transport = transport
        self._rank, self._size = transport.rank, transport.size
        self._messaging = Messaging(transport, settings)
        self._memory: Memory | None = None
        self._meetings: Meetings | None = None
        self._mail: Mailboxes | None = None
        self._closed = False
        self._keeps = False

    @property
    def choice(self) -> Choice:
        """Return the choice of schedules."""
        return self._messaging.choice

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
        self._messaging.lack(lacking)
        self._meetings = None if board is None else Meetings(board)
        self._mail = mail

    def close(self) -> None:
        """Let go of shared memory; what is prepared from now on is refused when it is to run."""
        self.share(None, None)
        self._closed = True

    # -- collectives -------------------------------------------------------------------------

    def allreduce(self, x: Any, op: str = "sum", algorithm: Algorithm = None) -> Prepared:
        buffer = self._wrap(x, writable=True)
        buffer.dtype.require(op)
        return self._by(algorithm).allreduce(buffer, op)

    def reduce(
        self, x: Any, root: int = 0, op: str = "sum", algorithm: Algorithm = None
    ) -> Prepared:
        root = self.root(root)
        buffer = self._wrap(x, writable=self._rank == root)
        buffer.dtype.require(op)
        return self._by(algorithm).reduce(buffer, op, root)

    def reduce_scatter(self, x: Any, op: str = "sum", algorithm: Algorithm = None) -> Prepared:
        buffer = self._wrap(x, writable=False)
        buffer.dtype.require(op)
        return self._by(algorithm).reduce_scatter(buffer, op)

    def broadcast(self, x: Any, root: int = 0, algorithm: Algorithm = None) -> Prepared:
        root = self.root(root)
        buffer = self._wrap(x, writable=self._rank != root)
        return self._by(algorithm).broadcast(buffer, root)

    def allgather(self, x: Any, algorithm: Algorithm = None) -> Prepared:
        return self._by(algorithm).allgather(self._wrap(x, writable=False))

    def gather(self, x: Any, root: int = 0, algorithm: Algorithm = None) -> Prepared:
        root = self.root(root)
        return self._by(algorithm).gather(self._wrap(x, writable=False), root)

    def scatter(self, x: Any = None, root: int = 0, algorithm: Algorithm = None) -> Prepared:
        root = self.root(root)
        rows = self._rows(x) if self._rank == root else None
        return self._by(algorithm).scatter(rows, root)

    def alltoall(self, x: Any, algorithm: Algorithm = None) -> Prepared:
        return self._by(algorithm).alltoall(self._rows(x))

    def barrier(self, algorithm: Algorithm = None) -> Prepared:
        return self._by(algorithm).barrier()

    def coming(self, name: str) -> Callable[[int], Steps]:
        """Return what waits for all ranks in what MPI waits for; see `Messaging.coming`."""
        return self._messaging.coming(name)

    def come(self, name: str, steps: Callable[[], Steps]) -> Prepared:
        """Prepare to come together by such steps."""
        return self._messaging.come(name, steps)

    # -- arrays ------------------------------------------------------------------------------

    def kind(self, x: Any) -> tuple[str, tuple[int, ...]]:
        """Return the element type's name, and the shape."""
        buffer = self._wrap(x, writable=False)
        return buffer.dtype.name, buffer.shape

    def like(self, x: Any, shape: tuple[int, ...]) -> Any:
        """Return a new array of x's library and element type."""
        return wrap(x, writable=False).like(shape)

    where = ""
    """On the host, of which errors need not tell."""

    def octets(self, x: Any, most: int | None = None) -> npt.NDArray[np.uint8] | None:
        """Return the bytes of x's elements in order: x's own where they lie so; of a view, a copy.

        None of more than `most` bytes.
        """
        buffer = wrap(x, writable=False)
        if most is not None and buffer.flat.nbytes > most:
            return None
        buffer.stage()
        return buffer.flat.view(np.uint8)

    # -- point to point ----------------------------------------------------------------------

    def send(self, x: Any, dst: int, tag: int = 0) -> Prepared:
        buffer, dst, tag = self._wrap(x, writable=False), self.peer(dst, "dst"), self.tag(tag)
        return self._to(dst).send(buffer, dst, tag)

    def recv(self, x: Any, src: int, tag: int = 0) -> Prepared:
        buffer, src, tag = self._wrap(x, writable=True), self.peer(src, "src"), self.tag(tag)
        return self._to(src).recv(buffer, src, tag)

    @property
    def posts(self) -> Posts:
        """Return this rank's messages through the transport."""
        return self._messaging.posts

    @property
    def mail(self) -> Mailboxes | None:
        """Return this rank's messages through shared memory."""
        return self._mail

    def by_mail(self, peer: int) -> bool:
        """Tell whether messages to and from a peer pass through shared memory."""
        return self._mail is not None and self._mail.reaches(peer)

    # -- ways and checks -----------------------------------------------------------------------

    def _by(self, algorithm: Algorithm) -> Meetings | Messaging:
        if self._meetings and algorithm is None:
            return self._meetings
        return self._messaging.by(algorithm)

    def _to(self, peer: int) -> Mailboxes | Messaging:
        return self._mail if self._mail and self._mail.reaches(peer) else self._messaging

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
        """Return a rank of this group, or raise an error."""
        return self.peer(root, "root")

    def peer(self, rank: int, what: str) -> int:
        """Return a rank of this group, or raise an error that calls it what it is."""
        rank = whole(what, rank)
        if not 0 <= rank < self._size:
            raise ValueError(
                f"{what} {rank} is outside 0..{self._size - 1}, the ranks of this group"
            )
        return rank

    @property
    def highest_tag(self) -> int:
        """Return the highest tag that a message can have."""
        return self._transport.max_tag

    def tag(self, tag: int) -> int:
        """Return a tag that every message can have, or raise an error."""
        tag = whole("tag", tag)
        if not 0 <= tag <= self.highest_tag:
            raise ValueError(f"tag {tag} is outside 0..{self.highest_tag}")
        return tag

    def _rows(self, x: Any) -> Buffer:
        """View x, which must have a row per rank."""
        buffer = self._wrap(x, writable=False)
        if not buffer.shape or buffer.shape[0] != self._size:
            raise ValueError(
                f"x: expected a first axis of {self._size}, a row per rank, got shape "
                f"{buffer.shape}"
            )
        return buffer
