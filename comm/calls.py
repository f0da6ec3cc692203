"""What users call on a group: collectives, messages between two ranks, and plans of these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import numpy as np
import numpy.typing as npt

from . import uneven
from .again import Errand, Repeated
from .device import on_device
from .memo import Memo
from .operations import Operations
from .runner import Runner
from .schedule import Algorithm
from .several import first_ended
from .work import Prepared, Work

if TYPE_CHECKING:
    from .device_ways import DeviceWays

Array = TypeVar("Array")
Now = Literal[True]
Later = Literal[False]


class GroupCalls:
    """The calls of one group, which a Communicator opens and closes."""

    rank: int
    size: int

    def __init__(self, runner: Runner, operations: Operations) -> None:
        self._runner = runner
        self._run = runner.run
        self._start = runner.start
        self._progress = runner.progress
        self._operations = operations
        self._device_operations: DeviceWays | None = None
        self._memo: Memo[Repeated] = Memo()
        self._errands: Memo[Errand] = Memo()
        self._barrier: Repeated | None = None
        self._letters: dict[int, npt.NDArray[np.uint8]] = {}
        self._nothing = np.zeros(0, np.uint8)  # stands for what need not be given

    # -- collectives -------------------------------------------------------------------------

    @overload
    def allreduce(
        self, x: Array, op: str = ..., *, algorithm: Algorithm = ..., blocking: Now = ...
    ) -> Array: ...
    @overload
    def allreduce(
        self, x: Any, op: str = ..., *, algorithm: Algorithm = ..., blocking: Later
    ) -> Work: ...
    @overload
    def allreduce(
        self, x: Any, op: str = ..., *, algorithm: Algorithm = ..., blocking: bool
    ) -> Any: ...

    def allreduce(
        self, x: Any, op: str = "sum", *, algorithm: Algorithm = None, blocking: bool = True
    ) -> Any:
        """Combine all ranks' x element by element, in place, and return x.

        op: sum, mean (over the ranks; of no integers), min, max or prod; bool allows min and max,
        complex numbers sum and mean.
        """
        try:
            known = self._memo.find((id(x), "allreduce", op))
        except TypeError:  # an op that is no name, such as a second array; refused below
            known = None
        if (  # here and not in a function, which a small call would notice
            known is not None
            and blocking
            and algorithm is None
            and x.flags.carray
            and x.size == known.size
            and x.dtype is known.dtype
            and not self._progress.works
        ):
            what = known.what
            return self._run(what.meeting, what.receipt, x, x)
        return self._call("allreduce", x, (op,), algorithm, blocking)

    @overload
    def reduce(
        self,
        x: Array,
        root: int = ...,
        op: str = ...,
        *,
        algorithm: Algorithm = ...,
        blocking: Now = ...,
    ) -> Array: ...
    @overload
    def reduce(
        self, x: Any, root: int = ..., op: str = ..., *, algorithm: Algorithm = ..., blocking: Later
    ) -> Work: ...
    @overload
    def reduce(
        self, x: Any, root: int = ..., op: str = ..., *, algorithm: Algorithm = ..., blocking: bool
    ) -> Any: ...

    def reduce(
        self,
        x: Any,
        root: int = 0,
        op: str = "sum",
        *,
        algorithm: Algorithm = None,
        blocking: bool = True,
    ) -> Any:
        """Combine all ranks' x in place at root; elsewhere x stays as it was. Returns x."""
        return self._call("reduce", x, (root, op), algorithm, blocking)

    @overload
    def broadcast(
        self, x: Array, root: int = ..., *, algorithm: Algorithm = ..., blocking: Now = ...
    ) -> Array: ...
    @overload
    def broadcast(
        self, x: Any, root: int = ..., *, algorithm: Algorithm = ..., blocking: Later
    ) -> Work: ...
    @overload
    def broadcast(
        self, x: Any, root: int = ..., *, algorithm: Algorithm = ..., blocking: bool
    ) -> Any: ...

    def broadcast(
        self, x: Any, root: int = 0, *, algorithm: Algorithm = None, blocking: bool = True
    ) -> Any:
        """Copy root's x over the x of every rank, in place, and return x."""
        return self._call("broadcast", x, (root,), algorithm, blocking)

    @overload
    def allgather(self, x: Any, *, algorithm: Algorithm = ..., blocking: Later) -> Work: ...
    @overload
    def allgather(self, x: Any, *, algorithm: Algorithm = ..., blocking: bool = ...) -> Any: ...

    def allgather(self, x: Any, *, algorithm: Algorithm = None, blocking: bool = True) -> Any:
        """Return a new array of shape (size, *x.shape): row r is rank r's x."""
        return self._call("allgather", x, (), algorithm, blocking)

    @overload
    def reduce_scatter(
        self, x: Any, op: str = ..., *, algorithm: Algorithm = ..., blocking: Later
    ) -> Work: ...
    @overload
    def reduce_scatter(
        self, x: Any, op: str = ..., *, algorithm: Algorithm = ..., blocking: bool = ...
    ) -> Any: ...

    def reduce_scatter(
        self, x: Any, op: str = "sum", *, algorithm: Algorithm = None, blocking: bool = True
    ) -> Any:
        """Combine all ranks' x and return this rank's part of the flat result, a new 1-D array.

        The part is `ringfold.comm.chunks.bounds(x.size, size, rank)`; x stays as it was.
        """
        return self._call("reduce_scatter", x, (op,), algorithm, blocking)

    @overload
    def gather(
        self, x: Any, root: int = ..., *, algorithm: Algorithm = ..., blocking: Later
    ) -> Work: ...
    @overload
    def gather(
        self, x: Any, root: int = ..., *, algorithm: Algorithm = ..., blocking: bool = ...
    ) -> Any: ...

    def gather(
        self, x: Any, root: int = 0, *, algorithm: Algorithm = None, blocking: bool = True
    ) -> Any:
        """Return, at root, a new array of shape (size, *x.shape); None on the other ranks."""
        return self._call("gather", x, (root,), algorithm, blocking)

    @overload
    def scatter(
        self, x: Any = ..., root: int = ..., *, algorithm: Algorithm = ..., blocking: Later
    ) -> Work: ...
    @overload
    def scatter(
        self, x: Any = ..., root: int = ..., *, algorithm: Algorithm = ..., blocking: bool = ...
    ) -> Any: ...

    def scatter(
        self, x: Any = None, root: int = 0, *, algorithm: Algorithm = None, blocking: bool = True
    ) -> Any:
        """Return row `rank` of root's x, a new array of shape x.shape[1:].

        Root alone needs to give x, in host memory (else TypeError), with a first axis of size.
        """
        if x is None and self.rank != root:
            x = self._nothing
        return self._call("scatter", x, (root,), algorithm, blocking)

    @overload
    def alltoall(self, x: Any, *, algorithm: Algorithm = ..., blocking: Later) -> Work: ...
    @overload
    def alltoall(self, x: Any, *, algorithm: Algorithm = ..., blocking: bool = ...) -> Any: ...

    def alltoall(self, x: Any, *, algorithm: Algorithm = None, blocking: bool = True) -> Any:
        """Send row r of x to rank r; return a new array whose row r is what rank r sent here."""
        return self._call("alltoall", x, (), algorithm, blocking)

    # -- collectives of rows of which each rank has another number ---------------------------

    def allgatherv(self, x: Array) -> Array:
        """Return all ranks' x, joined along the first axis, which may be of another length on each.

        Raises: MismatchError, on every rank, where dtypes or the other axes differ.
        """
        joined: Array = uneven.allgatherv(self, self._side(x), x)
        return joined

    def gatherv(self, x: Array, root: int = 0) -> Array | None:
        """Return, at root, all ranks' x, as `allgatherv` joins them; None on the other ranks."""
        joined: Array | None = uneven.gatherv(self, self._side(x), x, root)
        return joined

    def alltoallv(self, x: Array, counts: Iterable[int]) -> tuple[Array, list[int]]:
        """Send rows of x to each rank; return what came, by rank, and how many from each.

        counts: how many rows each rank gets, the first ones rank 0; together those of x. With the
            counts that came, the same call sends results back to where they belong.
            Rows go by messages of the highest tag, as those of `gatherv`.

        Raises: ValueError for counts that are not so; MismatchError, on every rank, where dtypes or
        the other axes differ.
        """
        rows: tuple[Array, list[int]] = uneven.alltoallv(self, self._side(x), x, counts)
        return rows

    @overload
    def barrier(self, *, algorithm: Algorithm = ..., blocking: Later) -> Work: ...
    @overload
    def barrier(self, *, algorithm: Algorithm = ..., blocking: bool = ...) -> Any: ...

    def barrier(self, *, algorithm: Algorithm = None, blocking: bool = True) -> Any:
        """Return when every rank has come."""
        what = self._barrier
        flying = what is not None and self._progress.works and what.meeting.flying
        if what is None or algorithm is not None or not blocking or flying:
            prepared = self._operations.barrier(algorithm)
            if algorithm is not None or not blocking or not prepared.plain:
                return self._start(prepared, blocking)
            what = self._barrier = self._runner.repeated(prepared)
        return self._run(what.meeting, what.receipt, None, None)

    # -- point to point ----------------------------------------------------------------------

    def send(self, x: Any, dst: int, tag: int = 0) -> None:
        """Send x to rank dst; when it returns, x may be changed.

        It may return before its recv has begun, and it may wait for that, whatever x's size: by the
        transport, and by what is under way. Ranks that all send before they receive rely on the
        former; isend does not wait.

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

    # -- plans -------------------------------------------------------------------------------

    def plan(self, collective: str, *args: Any, **kwargs: Any) -> Callable[[], Any]:
        """Decide a collective once, to run it many times on the same x.

        A result that is no x is made once, and holds what the last step has brought;
        a step takes no memory for data. (Each step of scatter, whose shape comes with the message,
        and of collectives on a GPU makes its result anew; the plain executor takes memory, too.)

        collective: the name of a method, args and kwargs as it takes them (no `blocking`).
        Returns: a function that runs it, collectively, and returns its result.
        Raises: ValueError for an unknown name, and what the method raises for its arguments.
        """
        if collective not in _PLANNED:
            raise ValueError(f"cannot plan {collective!r}; there is: {', '.join(_PLANNED)}")
        side = self._side(args[0] if args else kwargs.get("x")).keeping()
        prepared: Prepared = getattr(side, collective)(*args, **kwargs)
        return self._runner.plan(prepared)

    # -- how operations are prepared ---------------------------------------------------------

    def _call(
        self, name: str, x: Any, given: tuple[Any, ...], algorithm: Algorithm, blocking: bool
    ) -> Any:
        """Run a collective on x, at once where it was called on the same memory before."""
        what = self._memo.recall(x, name, given) if algorithm is None else None
        if what is None:
            prepared: Prepared = getattr(self._side(x), name)(x, *given, algorithm)
            if algorithm is not None or not prepared.plain:
                return self._start(prepared, blocking)
            what = self._memo.add(x, name, given, self._runner.repeated(prepared))
        take, flying = what.take, self._progress.works and what.meeting.flying
        if flying or (take is not None and not blocking):  # on its way already: do it twice
            return self._start(getattr(self._operations, name)(x, *given), blocking)
        result = x if what.make is None else what.make()
        if not blocking:
            return self._runner.fly(what.meeting, what.receipt, (x, result), result)
        result = self._run(what.meeting, what.receipt, (x, result), result)
        return result if take is None else take()

    def _message(self, name: str, x: Any, peer: int, tag: int, blocking: bool) -> Any:
        """Send or receive x, at once where it was before."""
        errand = self._errands.recall(x, name, (peer,))
        if errand is None:
            prepared: Prepared = getattr(self._side(x), name)(x, peer, tag)
            if prepared.carry is None:
                return self._start(prepared, blocking)
            errand = self._errands.add(x, name, (peer,), self._runner.errand(prepared))
        elif self._runner.express(errand, tag, blocking):
            return x if blocking else self._runner.ended(errand, x)
        return self._runner.carry(errand, x, self._operations.tag(tag), blocking)

    def letters(self, count: int) -> npt.NDArray[np.uint8]:
        """Lend letters for `uneven`, mostly the same ones; for the package's own use.

        To be returned once nothing reads or writes them: not behind an error, since what was waited
        for in vain goes on.
        """
        lent = self._letters.pop(count, None)  # at once, where several threads come
        return np.zeros((count, uneven.LETTER_BYTES), np.uint8) if lent is None else lent

    def give_back(self, letters: npt.NDArray[np.uint8]) -> None:
        """Take back what `letters` has lent."""
        self._letters[len(letters)] = letters

    def forget(self) -> None:
        """Prepare anew what was called before, as in memory that is given back."""
        self._memo.forget()
        self._errands.forget()
        self._barrier = None

    @property
    def host_operations(self) -> Operations:
        """Return what prepares operations on host memory; for the package's own use."""
        return self._operations

    def use_devices(self, operations: DeviceWays) -> None:
        """Let these prepare operations on device memory, before the first of them."""
        self._device_operations = operations

    def _side(self, x: Any) -> Operations | DeviceWays:
        """Return what prepares operations on memory such as x's."""
        if not on_device(x):
            return self._operations
        if self._device_operations is None:
            self.use_devices(self._find_devices())
        assert self._device_operations is not None
        return self._device_operations

    def _find_devices(self) -> DeviceWays:
        """Return what is to prepare operations on device memory, before the first of them."""
        raise NotImplementedError


_PLANNED = (
    "allreduce",
    "reduce",
    "broadcast",
    "allgather",
    "reduce_scatter",
    "gather",
    "scatter",
    "alltoall",
    "barrier",
)
