"""What ranks do with GPU memory that they open of each other; for mpirun, on a GPU or a fake one.

python ipc_job.py LARGEST [FOLDER]      # FOLDER: of `fake_cupy`, which is then used
"""

import sys

import numpy as np
from ipc_numbers import numbers

LARGEST = int(sys.argv[1])
if len(sys.argv) > 2:
    import fake_cupy

    runtime = fake_cupy.install(sys.argv[2])
    if len(sys.argv) > 3:
        runtime.forget_others = True

import cupy  # noqa: E402

import ringfold  # noqa: E402


def messages(comm: ringfold.Communicator) -> None:
    """Around the ring: from device to device, to and from host memory, of lengths that differ."""
    ahead, behind = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for count in (1, 5000, LARGEST):
        wanted = numbers(behind, count)
        for turn in range(5):
            x, y = cupy.zeros(count, np.float32), cupy.zeros(count, np.float32)
            x[...] = cupy.asarray(numbers(comm.rank, count))
            receiving = comm.irecv(y, behind, tag=turn)
            sending = comm.isend(x, ahead, tag=turn)
            x[...] = -1  # what is launched behind isend does not change what was sent
            receiving.wait()
            y += 1
            assert bool((y == cupy.asarray(wanted + 1)).all()), (count, turn)
            sending.wait()
            assert sending.receipt.transport == receiving.receipt.transport == "ipc"
        host, device = np.zeros(count, np.float32), cupy.zeros(count, np.float32)
        works = [comm.irecv(host, behind, tag=1), comm.irecv(device, behind, tag=2)]
        sent = cupy.asarray(numbers(comm.rank, count))
        works += [comm.isend(numbers(comm.rank, count), ahead, tag=2), comm.isend(sent, ahead, 1)]
        for work in works:
            work.wait()
        assert np.array_equal(host, wanted) and np.array_equal(device.get(), wanted)
        assert [work.receipt.transport for work in works[1:4:2]] == ["staged, shared"] * 2
    # Many at once, received in another order than they were sent.
    rows = [cupy.asarray(numbers(comm.rank, 700) + k) for k in range(20)]
    sends = [comm.isend(row, ahead, tag=k) for k, row in enumerate(rows)]
    found = [cupy.zeros(700, np.float32) for _ in rows]
    for k in reversed(range(20)):
        comm.recv(found[k], behind, tag=k)
    for k, row in enumerate(found):
        assert np.array_equal(row.get(), numbers(behind, 700) + k)
    for work in sends:
        work.wait()
    x = cupy.zeros(4, np.float32)
    receiving = comm.irecv(x, behind, tag=30)
    with_error = comm.isend(cupy.zeros(5, np.float32), ahead, tag=30)
    for work in (receiving, with_error):
        try:
            work.wait()
        except ringfold.MismatchError as error:
            assert "sends 20 bytes" in str(error) and "expects 16" in str(error)
        else:
            raise AssertionError("lengths differ, and nobody told")
    if comm.rank == 0:
        comm.send(cupy.zeros(0, np.float32), 1)
        own = comm.irecv(x, 0)
        comm.isend(cupy.asarray(numbers(7, 4)), 0).wait()
        own.wait()
        assert np.array_equal(x.get(), numbers(7, 4))
    elif comm.rank == 1:
        comm.recv(cupy.zeros(0, np.float32), 0)


def groups(comm: ringfold.Communicator) -> None:
    """Two groups open the same memory, and one of them ends before the other."""
    x = comm.empty(1000, np.float32, device="cuda")
    x[...] = 1
    comm.allreduce(x)
    with comm.split(0) as other:
        work = other.allreduce(x, blocking=False)
        work.wait()
        assert work.receipt.transport == "ipc"
    comm.allreduce(x)
    assert bool((x == comm.size**3).all())
    # Memory that others have open is used again, by whoever asks for as much.
    for k in range(5):
        x = None
        x = comm.empty(1000, np.float32, device="cuda")
        x[...] = k + comm.rank
        comm.allreduce(x)
        assert bool((x == k * comm.size + comm.size * (comm.size - 1) // 2).all())


def collectives(comm: ringfold.Communicator) -> None:
    for count in (1, 3, 1000, LARGEST):
        x = comm.empty(count, np.float32, device="cuda")
        x[...] = comm.rank + 1
        work = comm.allreduce(x, blocking=False)
        work.wait()
        assert work.receipt.transport == "ipc", work.receipt
        assert bool((x == comm.size * (comm.size + 1) / 2).all())
    x[...] = 1
    for _ in range(50 if LARGEST > 10_000 else 5):
        x *= 1 / comm.size
        comm.allreduce(x)
    assert bool((abs(x - 1) < 1e-5).all())
    for call in (
        lambda x: comm.reduce(x, 0, "max", blocking=False),
        lambda x: comm.reduce_scatter(x, blocking=False),
        lambda x: comm.allgather(x, blocking=False),
        lambda x: comm.gather(x, 0, blocking=False),
        lambda x: comm.broadcast(x, 0, blocking=False),
        lambda x: comm.alltoall(x, blocking=False),
    ):
        device = comm.empty((comm.size, 1001), np.float32, device="cuda")
        host = np.arange(comm.size * 1001, dtype=np.float32).reshape(comm.size, 1001)
        host = host % 97 + comm.rank
        device[...] = cupy.asarray(host)
        work, twin = call(device), call(host)
        assert work.receipt.transport.startswith("ipc"), work.receipt
        found, wanted = work.wait(), twin.wait()
        assert (found is None) == (wanted is None), work.receipt
        assert found is None or np.array_equal(found.get(), wanted), work.receipt
    y = cupy.arange(1000, dtype=cupy.float32)
    comm.allreduce(y, "mean")
    assert bool((y == cupy.arange(1000)).all())


with ringfold.Communicator() as comm, cupy.cuda.Stream(non_blocking=True):
    if len(sys.argv) > 3 and comm.rank % 2:
        fake_cupy.LATE = 0.05  # so that what does not wait for this rank comes too early
    for part in (messages, groups, collectives):
        if len(sys.argv) < 4 or part.__name__ == sys.argv[3]:
            part(comm)
print("right")
