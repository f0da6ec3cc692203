"""What users call on a group: collectives, and plans of these."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from . import uneven
from .again import Repeated
from .memo import Memo
from .message_calls import Array, MessageCalls
from .operations import Operations
from .runner import Runner
from .schedule import Algorithm
from .work import Prepared, Work

Now = Literal[True]
Later = Literal[False]


class GroupCalls(MessageCalls):
    """The calls of one group, which a Communicator opens and closes."""

    rank: int
    size: int

    def __init__(self, runner: Runner, operations: Operations) -> None:
        super().__init__(runner, operations)
        self._run = runner.run
        self._start = runner.start
        self._progress = runner.progress
        self._memo: Memo[Repeated] = Memo()
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

    # -- how they are prepared -------------------------------------------------------------

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
