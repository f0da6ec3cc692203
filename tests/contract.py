"""What every algorithm, on every transport, owes its callers: one body for all rungs.

Data differs by rank and by element; sums stay exact in every type. `comm` may have any size.
"""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from ringfold import Communicator, Settings
from ringfold.comm.algorithms import BUILDERS
from ringfold.comm.chunks import bounds
from ringfold.comm.dtypes import dtype_named
from ringfold.comm.transport.base import Channel
from ringfold.comm.transport.mpi import MpiTransport

Array = npt.NDArray[Any]
GUARD = 16
_AGAIN = itertools.count(1)
SEVENS = 7


def lengths(size: int) -> list[int]:
    """Return the lengths at which splitting goes wrong, if it does."""
    return sorted({0, 1, max(size - 1, 0), size, size + 1, 2 * size + 1, 1000, 10007})


def data(rank: int, count: int, dtype: Any) -> Array:
    """Return a rank's elements: small whole numbers, exact in half precision when added."""
    values = (np.arange(count) % SEVENS + 1) * (rank + 1)
    if np.dtype(dtype).kind == "c":
        values = values + 1j * (count - np.arange(count)) * (rank - 2)
    return values.astype(dtype)


def _mean(rows: Array) -> Array:
    """Return the mean over the ranks; NumPy divides a complex number as by another one."""
    total = rows.sum(0)
    if total.dtype.kind != "c":
        return total / len(rows)
    return total.real / len(rows) + 1j * (total.imag / len(rows))


FOLDS: dict[str, Callable[[Array], Array]] = {
    "sum": lambda rows: rows.sum(0),
    "mean": _mean,
    "min": lambda rows: rows.min(0),
    "max": lambda rows: rows.max(0),
    "prod": lambda rows: rows.prod(0),
}


def expected(op: str, size: int, count: int, dtype: Any) -> Array:
    """Return the reduction of all ranks' data, computed in float64 or complex128."""
    wide = np.result_type(dtype, np.float64)
    rows = np.stack([data(rank, count, wide) for rank in range(size)])
    return FOLDS[op](rows).astype(dtype)


@contextmanager
def guarded(values: Array) -> Iterator[Array]:
    """Lend a copy of values amid guard elements, and see the guards unchanged afterwards."""
    whole = np.empty(values.size + 2 * GUARD, values.dtype)
    whole.view(np.uint8)[:] = 0xA5
    middle = whole[GUARD : GUARD + values.size]
    middle[:] = values
    yield middle
    for guard in (whole[:GUARD], whole[GUARD + values.size :]):
        assert (guard.view(np.uint8) == 0xA5).all(), "memory outside the buffer was written"


@contextmanager
def reopened(comm: Communicator, **changes: Any) -> Iterator[Communicator]:
    """Open a communicator of the same ranks with other settings."""
    transport: Any = comm._transport
    if isinstance(transport, MpiTransport):  # with notices of its own
        transport = MpiTransport(transport._mpi, transport._channels[Channel.COLLECTIVE])
    else:
        transport = transport.split(0, comm.rank)
    assert transport is not None
    with Communicator.over(transport, Settings(**changes), name=f"again{next(_AGAIN)}") as other:
        yield other


def check_allreduce(comm: Communicator, algorithm: str, dtype: Any = np.float64) -> None:
    for count in lengths(comm.size):
        for op in ("sum", "mean", "max"):
            if op not in dtype_named(np.dtype(dtype).name).ops:
                continue
            with guarded(data(comm.rank, count, dtype)) as x:
                assert comm.allreduce(x, op, algorithm=algorithm) is x
                np.testing.assert_array_equal(x, expected(op, comm.size, count, dtype))


def check_reduce(comm: Communicator, algorithm: str) -> None:
    for root in range(comm.size):
        for count in lengths(comm.size):
            mine = data(comm.rank, count, np.int64)
            with guarded(mine) as x:
                assert comm.reduce(x, root, algorithm=algorithm) is x
                right = expected("sum", comm.size, count, np.int64) if comm.rank == root else mine
                np.testing.assert_array_equal(x, right)


def check_reduce_scatter(comm: Communicator, algorithm: str, dtype: Any = np.float32) -> None:
    for count in lengths(comm.size):
        mine = data(comm.rank, count, dtype)
        low, high = bounds(count, comm.size, comm.rank)
        with guarded(mine) as x:
            part = comm.reduce_scatter(x, algorithm=algorithm)
            np.testing.assert_array_equal(x, mine)
        right = expected("sum", comm.size, count, dtype)[low:high]
        np.testing.assert_array_equal(part, right)
        assert part.dtype == dtype


def check_broadcast(comm: Communicator, algorithm: str) -> None:
    for root in range(comm.size):
        for count in lengths(comm.size):
            with guarded(data(comm.rank, count, np.int16)) as x:
                assert comm.broadcast(x, root, algorithm=algorithm) is x
                np.testing.assert_array_equal(x, data(root, count, np.int16))


def _rows(comm: Communicator, count: int) -> Array:
    return np.stack([data(rank, count, np.float32) for rank in range(comm.size)])


def check_allgather(comm: Communicator, algorithm: str) -> None:
    for count in lengths(comm.size):
        rows = comm.allgather(data(comm.rank, count, np.float32), algorithm=algorithm)
        np.testing.assert_array_equal(rows, _rows(comm, count))


def check_gather(comm: Communicator, algorithm: str) -> None:
    for root in range(comm.size):
        for count in lengths(comm.size):
            rows = comm.gather(data(comm.rank, count, np.float32), root, algorithm=algorithm)
            if comm.rank == root:
                np.testing.assert_array_equal(rows, _rows(comm, count))
            else:
                assert rows is None


def check_scatter(comm: Communicator, algorithm: str) -> None:
    for root in range(comm.size):
        for count in lengths(comm.size):
            given = _rows(comm, count) if comm.rank == root else None
            mine = comm.scatter(given, root, algorithm=algorithm)
            np.testing.assert_array_equal(mine, data(comm.rank, count, np.float32))
            assert mine.dtype == np.float32


def check_alltoall(comm: Communicator, algorithm: str) -> None:
    size, rank = comm.size, comm.rank
    for count in lengths(size):
        sent = np.stack([data(rank * size + dst, count, np.int32) for dst in range(size)])
        kept = sent.copy()
        got = comm.alltoall(sent, algorithm=algorithm)
        np.testing.assert_array_equal(sent, kept)
        right = np.stack([data(src * size + rank, count, np.int32) for src in range(size)])
        np.testing.assert_array_equal(got, right)


def check_barrier(comm: Communicator, algorithm: str) -> None:
    for _ in range(3):
        comm.barrier(algorithm=algorithm)
        comm.barrier()


CHECKS: dict[str, Callable[[Communicator, str], None]] = {
    "allreduce": check_allreduce,
    "reduce": check_reduce,
    "reduce_scatter": check_reduce_scatter,
    "broadcast": check_broadcast,
    "allgather": check_allgather,
    "gather": check_gather,
    "scatter": check_scatter,
    "alltoall": check_alltoall,
    "barrier": check_barrier,
}
"""collective -> its contract; an algorithm is tested by being registered."""

ALGORITHMS = [f"{collective}:{algorithm}" for collective, algorithm in BUILDERS]

NUMBERS = [
    "float16",
    "float32",
    "float64",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    "complex64",
]


def check_messages(comm: Communicator) -> None:
    """Send around the ring, blocking and not, with tags that arrive in another order."""
    ahead, behind = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for count in (0, 1, 5, 70_001):
        sends = [comm.isend(data(comm.rank + tag, count, np.float64), ahead, tag) for tag in (1, 2)]
        second = comm.recv(np.empty(count), behind, 2)
        first = comm.irecv(np.empty(count), behind, 1).wait()
        np.testing.assert_array_equal(first, data(behind + 1, count, np.float64))
        np.testing.assert_array_equal(second, data(behind + 2, count, np.float64))
        for send in sends:
            send.wait()
        x, y = data(comm.rank, count, np.float64), np.empty(count)
        for step in range(3):  # known from the second one on
            x += step
            assert comm.sendrecv(x, ahead, y, behind, 4) is y
            np.testing.assert_array_equal(y, data(behind, count, np.float64) + sum(range(step + 1)))
    # Two messages of one tag and many pieces must not interleave.
    with reopened(comm, max_message_bytes=64) as small:
        works = [small.isend(data(comm.rank + k, 1001, np.int32), ahead) for k in range(3)]
        gets = [small.irecv(np.empty(1001, np.int32), behind) for _ in range(3)]
        for k, work in enumerate(gets):
            np.testing.assert_array_equal(work.wait(), data(behind + k, 1001, np.int32))
        for work in works:
            work.wait()


def check_overlapping_works(comm: Communicator) -> None:
    """Start several collectives at once, on a group and on its halves, and end them backwards."""
    half = comm.split(comm.rank % 2)
    assert half is not None
    arrays = [data(comm.rank + k, 50_000 + k, np.float64) for k in range(6)]
    groups = [comm, half] * 3
    works = [group.allreduce(x, blocking=False) for group, x in zip(groups, arrays, strict=True)]
    gathered = comm.allgather(np.array([comm.rank]), blocking=False)
    together = comm.allreduce(np.array([1]))
    assert together[0] == comm.size
    assert gathered.wait().ravel().tolist() == list(range(comm.size))
    mates = [rank for rank in range(comm.size) if rank % 2 == comm.rank % 2]
    for k in reversed(range(6)):
        members = range(comm.size) if groups[k] is comm else mates
        right = sum(data(rank + k, 50_000 + k, np.float64) for rank in members)
        np.testing.assert_array_equal(works[k].wait(), right)
        assert works[k].done() and works[k].exception() is None
        assert works[k].receipt.operation == "allreduce"
    half.close()


def check_groups(comm: Communicator) -> None:
    """Split by parity, ranks in reverse; leave one rank out; use the node."""
    group = comm.split(comm.rank % 2, -comm.rank)
    assert group is not None
    mates = [rank for rank in reversed(range(comm.size)) if rank % 2 == comm.rank % 2]
    assert (group.rank, group.size) == (mates.index(comm.rank), len(mates))
    assert group.allgather(np.array([comm.rank])).ravel().tolist() == mates
    group.close()
    outside = comm.split(None if comm.rank == 0 else 7)
    assert (outside is None) == (comm.rank == 0)
    if outside is not None:
        assert outside.size == comm.size - 1
        outside.close()
    node = comm.node.allreduce(np.array([1]))[0]
    assert node == comm.node.size >= 1
    assert comm.node.node is comm.node


def check_uneven_rows(comm: Communicator, place: Callable[[Array], Any] = np.asarray) -> None:
    """Join rows of which each rank has another number, send them apart, and back again.

    place: makes the array that is passed of its values; `get` of what comes back has them, if any.
    """
    size, rank = comm.size, comm.rank

    def plain(x: Any) -> Array:
        return np.asarray(x.get() if hasattr(x, "get") else x)

    # 1,536 bytes are told along: 192 rows of 8, or 256 of 6. Some ranks have twice as many.
    for scale in (0, 1, 130, 192, 193, 256, 257, 3000):
        lengths_of = [scale * ((one + 1) % 3) for one in range(size)]
        rows = [data(one, 2 * n, np.float32).reshape(n, 2) for one, n in enumerate(lengths_of)]
        x = place(rows[rank])
        everything = comm.allgatherv(x)
        np.testing.assert_array_equal(plain(everything), np.concatenate(rows))
        assert type(everything) is type(x)
        for root in {0, size - 1}:
            found = comm.gatherv(x, root)
            assert (found is None) == (rank != root)
            if found is not None:
                np.testing.assert_array_equal(plain(found), np.concatenate(rows))

        counts = [[scale * ((src + 2 * dst) % 3) for dst in range(size)] for src in range(size)]
        cells = [[np.full((n, 3), 10 * s + d, np.int16) for d, n in enumerate(counts[s])]
                 for s in range(size)]  # fmt: skip
        y, came = comm.alltoallv(place(np.concatenate(cells[rank])), counts[rank])
        assert came == [counts[src][rank] for src in range(size)]
        np.testing.assert_array_equal(plain(y), np.concatenate([row[rank] for row in cells]))
        back, again = comm.alltoallv(y, came)
        assert again == counts[rank]
        np.testing.assert_array_equal(plain(back), np.concatenate(cells[rank]))


def check_plans(comm: Communicator) -> None:
    """Run one plan many times on an array that changes between the steps."""
    x = comm.empty(1003, np.float32)
    step = comm.plan("allreduce", x, op="mean")
    for turn in range(4):
        x[:] = data(comm.rank + turn, 1003, np.float32)
        assert step() is x
        rows = np.stack([data(rank + turn, 1003, np.float64) for rank in range(comm.size)])
        np.testing.assert_array_equal(x, (rows.sum(0) / comm.size).astype(np.float32))
    for count in (1, 40_001):
        check_kept_results(comm, count)


def check_kept_results(comm: Communicator, count: int) -> None:
    """A plan's result is made once, and holds what the last step has brought."""
    mine = np.zeros((comm.size, count), np.float32)
    steps = {name: comm.plan(name, mine) for name in ("allgather", "alltoall", "gather")}
    steps["reduce_scatter"] = comm.plan("reduce_scatter", mine)
    first: dict[str, Any] = {}
    for turn in range(3):
        ranks = np.arange(comm.size, dtype=np.float32) + turn
        everything = np.broadcast_to(ranks[:, None, None], (comm.size, comm.size, count))
        wanted = {
            "allgather": everything,
            "alltoall": everything[:, 0],
            "gather": everything if comm.rank == 0 else None,
            "reduce_scatter": np.full(count, ranks.sum()),
        }
        for name, step in steps.items():
            mine[:] = ranks[comm.rank]
            result = step()
            np.testing.assert_array_equal(result, wanted[name])
            assert result is first.setdefault(name, result)


def check_steps_take_no_memory(comm: Communicator, x: Array) -> None:
    """A plan's steps need a few KiB of notes and handles, whatever x is. x: a row for each rank."""
    for name in (
        "allreduce",
        "allgather",
        "alltoall",
        "broadcast",
        "gather",
        "reduce",
        "reduce_scatter",
    ):
        step = comm.plan(name, x)
        step()
        # Steps on an idle machine take 7 KB. On a busy one ranks wait long enough to ask each other
        # what they have called, in some 60 KB.
        peak = min(_peak_of(step) for _ in range(4))
        assert peak < 100_000, f"steps of {name} of {x.nbytes} bytes took {peak}"


def _peak_of(step: Callable[[], Any]) -> int:
    tracemalloc.start()
    for _ in range(4):
        step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def come_late(comm: Communicator, x: Array, late: int) -> None:
    """Reduce x on all ranks; rank `late` comes when it knows that all others have."""
    token = np.zeros(1)
    if comm.rank == late:
        for rank in range(comm.size):
            if rank != late:
                comm.recv(token, rank)
        comm.allreduce(x)
    else:
        work = comm.allreduce(x, blocking=False)
        comm.send(token, late)
        work.wait()
