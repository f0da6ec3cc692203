"""Faults that users of other libraries met, each as one body for the rungs with ranks.

The names tell the story; numbers are those of the reports, or the same for any number of ranks.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from contract import guarded, lengths, reopened
from fake_device import AWARE, UNAWARE, FakeArray, use_fake

from ringfold import Communicator


def zero_elements(comm: Communicator) -> None:
    """A rank has nothing to report: empty tensors are a normal case everywhere."""
    for op in ("sum", "mean", "max"):
        x = np.empty(0, np.float32)
        assert comm.allreduce(x, op) is x and x.shape == (0,)
    rows = comm.allgather(np.empty((1, 0, 2), np.float32))
    assert rows.shape == (comm.size, 1, 0, 2) and rows.dtype == np.float32
    assert comm.broadcast(np.empty((0, 4))).shape == (0, 4)
    ahead, behind = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    send = comm.isend(np.empty((0, 4)), ahead)
    assert comm.recv(np.empty((0, 4)), behind).shape == (0, 4)
    send.wait()
    assert comm.reduce_scatter(np.empty(0)).shape == (0,)
    assert comm.alltoall(np.empty((comm.size, 0))).shape == (comm.size, 0)


def every_length(comm: Communicator) -> None:
    """The tail that does not divide by the ranks is neither lost nor written past the end."""
    for segment in (1 << 19, 8):
        with reopened(comm, segment_bytes=segment) as other:
            for count in lengths(comm.size):
                if segment == 8 and count > 1000:
                    continue
                for dtype in (np.int64, np.float64):
                    index = np.arange(1, count + 1)
                    with guarded(((comm.rank + 1) * index).astype(dtype)) as x:
                        other.allreduce(x)
                        total = comm.size * (comm.size + 1) // 2
                        np.testing.assert_array_equal(x, total * index)


def many_small_messages(comm: Communicator) -> None:
    """What passes the largest message is split, in every operation, down to one element."""
    for limit in (4000, 3):
        count = 12_345 if limit == 4000 else 321
        with reopened(comm, max_message_bytes=limit) as other:
            x = np.full(count, comm.rank + 1, np.float32)
            other.allreduce(x)
            assert (x == comm.size * (comm.size + 1) // 2).all()
            root = comm.size - 1
            y = np.full(count, comm.rank, np.float32)
            assert (other.broadcast(y, root) == root).all()
            ahead, behind = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
            work = other.isend(np.full(count, comm.rank, np.float32), ahead)
            assert (other.recv(np.empty(count, np.float32), behind) == behind).all()
            work.wait()
            rows = other.gather(np.full(count, comm.rank, np.float32), root)
            if comm.rank == root:
                assert (rows == np.arange(comm.size)[:, None]).all()


def memory_layout(comm: Communicator) -> None:
    """Elements meet by index, not by address, whatever each rank's strides are."""
    logical = np.array([[0, 1, 2], [3, 4, 5]], np.float64)
    order = "C" if comm.rank == 0 else "F"
    x = np.array(logical * 10**comm.rank, order=order)
    comm.allreduce(x)
    np.testing.assert_array_equal(x, logical * sum(10**rank for rank in range(comm.size)))
    total = comm.size * (comm.size + 1) // 2
    whole = np.full(10, comm.rank + 1.0)
    comm.allreduce(whole[::2])
    assert (whole[::2] == total).all() and (whole[1::2] == comm.rank + 1).all()
    whole = np.arange(5.0) * (comm.rank + 1)
    comm.allreduce(whole[::-1])
    np.testing.assert_array_equal(whole, np.arange(5.0) * total)
    expanded = np.lib.stride_tricks.as_strided(np.zeros(3), (4, 3), (0, 8))
    with pytest.raises(ValueError, match="several elements to one address"):
        comm.allreduce(expanded)
    rows = comm.allgather(np.broadcast_to(np.array([1.0, 2.0, 3.0]) * (comm.rank + 1), (4, 3)))
    assert rows.shape == (comm.size, 4, 3) and (rows[-1, :, 2] == 3.0 * comm.size).all()
    frozen = np.zeros(3)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        comm.allreduce(frozen)


def half_width(comm: Communicator) -> None:
    """float16 is added in float32; its mean neither overflows nor vanishes."""
    size = comm.size
    base = np.array([0.5, 1.5, -2.0])
    total = size * (size + 1) / 2
    for algorithm in (None, "ring", "pairwise", "recursive_doubling"):
        x = (base * (comm.rank + 1)).astype(np.float16)
        comm.allreduce(x, algorithm=algorithm)
        np.testing.assert_array_equal(x, (base * total).astype(np.float16))
        x = (base * (comm.rank + 1)).astype(np.float16)
        comm.allreduce(x, "mean", algorithm=algorithm)
        np.testing.assert_array_equal(x, (base * total / size).astype(np.float16))
        for value in (40000.0, 2.0**-24):
            x = np.full(5, value, np.float16)
            assert (comm.allreduce(x, "mean", algorithm=algorithm) == np.float16(value)).all()
    bits = np.array([-0.0, np.inf, np.nan, 2.0**-24], np.float16)
    ahead, behind = (comm.rank + 1) % size, (comm.rank - 1) % size
    work = comm.isend(bits, ahead)
    got = comm.recv(np.zeros(4, np.float16), behind)
    work.wait()
    assert got.tobytes() == bits.tobytes()


def mean_of_integers(comm: Communicator) -> None:
    """A mean divides by the ranks; of integers it is refused, never rounded."""
    x = np.full(5, 2.0 * (comm.rank + 1), np.float32)
    assert (comm.allreduce(x, "mean") == comm.size + 1).all()
    for dtype in (np.int32, np.uint8, np.int64):
        with pytest.raises(TypeError, match=r"mean.*not defined"):
            comm.allreduce(np.ones(4, dtype), "mean")
    x32 = np.array([1, 2, 4, -1], np.int32) * (comm.rank + 1)
    comm.allreduce(x32)
    np.testing.assert_array_equal(x32, np.array([1, 2, 4, -1]) * (comm.size * (comm.size + 1) // 2))
    flags = np.array([comm.rank == 0, True, False])
    np.testing.assert_array_equal(comm.allreduce(flags.copy(), "max"), [True, True, False])
    np.testing.assert_array_equal(
        comm.allreduce(flags.copy(), "min"), [comm.size == 1, True, False]
    )
    with pytest.raises(TypeError, match=r"sum.*bool.*min, max"):
        comm.allreduce(flags)


def dropped_sends(comm: Communicator) -> None:
    """A send whose array and handle were thrown away still sends what it was given."""
    if comm.size == 1:
        return
    last = comm.size - 1
    for transposed in (False, True):
        if comm.rank == 0:
            ones = np.ones((1000, 2000), np.float32)
            comm.isend(ones.T if transposed else ones, last)
            del ones
            gc.collect()
            clutter = [np.full(2_000_000, 9, np.float32) for _ in range(3)]
            time.sleep(0.4)
            assert len(clutter) == 3
        elif comm.rank == last:
            time.sleep(0.2)
            shape = (2000, 1000) if transposed else (1000, 2000)
            got = comm.recv(np.zeros(shape, np.float32), 0)
            assert (got == 1).all()
    comm.barrier()


def roots(comm: Communicator) -> None:
    """`root` is honoured, is a rank of the group, and is checked."""
    size, rank = comm.size, comm.rank
    last = size - 1
    assert (comm.broadcast(np.full(4, rank), last) == last).all()
    middle = size // 2
    given = np.arange(3 * size).reshape(size, 3) if rank == middle else None
    np.testing.assert_array_equal(comm.scatter(given, middle), np.arange(3) + 3 * rank)
    rows = comm.gather(np.array([rank]), last)
    assert (rows is None) == (rank != last)
    if rank == last:
        assert rows.ravel().tolist() == list(range(size))
    for call in (comm.broadcast, comm.reduce, comm.gather, comm.scatter):
        for root in (size, -1):
            with pytest.raises(ValueError, match=rf"root {root} is outside 0\.\.{last}"):
                call(np.zeros((size, 1)), root=root)


def late_kernels(comm: Communicator) -> None:
    """MPI reads a device buffer before the kernel has filled it; here all kernels are late."""
    for aware in (UNAWARE, AWARE):
        with reopened(comm, shared=False, timeout=30) as other:
            gpu = use_fake(other, 1 << 10, aware=aware)
            x = FakeArray(gpu, np.ones(1000, np.float32), stream=9)
            for _ in range(5):
                gpu.launch(9, partial(np.divide, x.values, other.size, out=x.values))
                other.allreduce(x)
            ahead, behind = (other.rank + 1) % other.size, (other.rank - 1) % other.size
            y = FakeArray(gpu, np.empty(1000, np.float32), stream=9)
            gpu.launch(9, partial(np.add, x.values, other.rank, out=x.values))
            sending = other.isend(x, ahead)
            other.recv(y, behind)
            sending.wait()
            np.testing.assert_allclose(y.get(), 1 + behind, rtol=1e-6)


REPORTS: dict[str, Callable[[Communicator], None]] = {
    "PR-01": zero_elements,
    "PR-02": every_length,
    "PR-03": many_small_messages,
    "PR-04": memory_layout,
    "PR-05": half_width,
    "PR-06": mean_of_integers,
    "PR-08": dropped_sends,
    "PR-09": roots,
    "PR-12": late_kernels,
}
