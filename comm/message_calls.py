"""What users call to send from one rank of a group to another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from .again import Errand
from .memo import Memo
from .operations import Operations
from .runner import Runner
from .several import first_ended
from .sides import Sides
from .work import Prepared, Work

Array = TypeVar("Array")


class MessageCalls(Sides):
    """The messages of one group."""

    def __init__(self, runner: Runner, operations: Operations) -> None:
        super().__init__(operations)
        self._runner = runner
        self._errands: Memo[Errand] = Memo()

    def send(self, x: Any, dst: int, tag: int = 0) -> None:
        """Send x to rank dst; when it returns, x may be changed.

        It may return before its recv has begun, and it may wait for that, whatever x's size: by the
        transport, and by what is under way. Ranks that all send before they receive rely on the
        former; sendrecv and isend do not wait.

        tag: 0 to the transport's largest, which gatherv and alltoallv use; else ValueError. A recv
            takes messages with its own tag, in the order of their sending.
        """
        self._message("send", x, dst, tag, True)

    def recv(self, x: Array, src: int, tag: int = 0) -> Array:
        """Fill x with rank src's next message with this tag, and return x.

        Raises: MismatchError where it has another number of bytes.
        """
        self._message("recv", x, src, tag, True)
        return x

    def sendrecv(self, x: Any, dst: int | None, y: Array, src: int | None, tag: int = 0) -> Array:
        """Send x to rank dst, fill y with rank src's next message, and return y.

        Neither waits for the other: all ranks of a ring or a grid may call it at once. Any send and
        recv with this tag may be at the other ends.

        dst, src: None for no rank, as beyond the border of a grid; without src y stays as it was.
        y: other memory than x.

        Raises: as send and recv; what is wrong with an argument is told before anything is sent.
        """
        if x is y and dst is not None and src is not None:
            raise ValueError("sendrecv: expected another array to receive into than the one sent")
        coming: Errand | Prepared | None = None
        if src is not None and self._errands.recall(y, "recv", (src,)) is None:
            coming = self._prepare("recv", y, src, tag)
        sending = None if dst is None else self.isend(x, dst, tag)
        if coming is not None:
            self._begin(coming, y, tag, True)
        elif src is not None:
            self._message("recv", y, src, tag, True)
        if sending is not None:
            sending.wait()
        return y

    def isend(self, x: Any, dst: int, tag: int = 0) -> Work:
        """Start to send x; the Work, or the communicator if it is dropped, keeps x alive."""
        work: Work = self._message("send", x, dst, tag, False)
        return work

    def irecv(self, x: Any, src: int, tag: int = 0) -> Work:
        """Start to receive into x; wait() returns x."""
        work: Work = self._message("recv", x, src, tag, False)
        return work

    def wait_any(self, works: Sequence[Work], timeout: float | None = None) -> int:
        """Wait until one of several works has ended, well or not, and return its place among them.

        works: of any group of this rank; of several that have ended it is the first. What ended it
            is told by its wait(). One irecv for each rank that may send stands for a receive
            from any source.
        timeout: seconds; the communicator's own where None.

        Raises: CommTimeout when time is up, all of them going on; ValueError without works.
        """
        return first_ended(works, timeout, self._runner.progress)

    def _message(self, name: str, x: Any, peer: int, tag: int, blocking: bool) -> Any:
        """Send or receive x, at once where it was before."""
        errand = self._errands.recall(x, name, (peer,))
        if errand is None:
            return self._begin(self._prepare(name, x, peer, tag), x, tag, blocking)
        if self._runner.express(errand, tag, blocking):
            return x if blocking else self._runner.ended(errand, x)
        return self._begin(errand, x, tag, blocking)

    def _prepare(self, name: str, x: Any, peer: int, tag: int) -> Errand | Prepared:
        """Prepare a message, and remember it where it may come again."""
        prepared: Prepared = getattr(self._side(x), name)(x, peer, tag)
        if prepared.carry is None:
            return prepared
        return self._errands.add(x, name, (peer,), self._runner.errand(prepared))

    def _begin(self, what: Errand | Prepared, x: Any, tag: int, blocking: bool) -> Any:
        if isinstance(what, Prepared):
            return self._runner.start(what, blocking)
        return self._runner.carry(what, x, self._operations.tag(tag), blocking)
