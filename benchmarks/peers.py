"""The others in the same run: MPI's own through mpi4py, and torch.distributed's gloo."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

import ringfold
from ringfold.comm.texts import gather_texts

PEERS: Mapping[str, str] = {"mpi": "mpi4py", "gloo": "torch"}
"""peer -> the module that it needs."""

Run = Callable[[], Any]


@dataclass(frozen=True)
class Buffers:
    """What a rank puts in, and where a separate result goes; x is changed where it is in place."""

    x: Any
    result: Any


def importable() -> list[str]:
    """Name the peers whose modules are installed."""
    return [peer for peer, module in PEERS.items() if importlib.util.find_spec(module)]


def partners(rank: int, size: int) -> tuple[int | None, int | None]:
    """Return whom a rank of `send` sends to, and whom it receives from: pairs of neighbours."""
    if rank % 2:
        return None, rank - 1
    return (rank + 1, None) if rank + 1 < size else (None, None)


def mpi_run(mpi: Any, collective: str, buffers: Buffers, op: str) -> Run | None:
    """Return MPI's own operation on NumPy arrays; None where MPI lacks the type."""
    from mpi4py import MPI

    x, result = buffers.x, buffers.result
    if not isinstance(x, np.ndarray) or x.dtype == np.float16:
        return None
    how = {"sum": MPI.SUM, "min": MPI.MIN, "max": MPI.MAX}[op]
    rank, size = mpi.rank, mpi.size
    root = rank == 0
    to, come = partners(rank, size)

    def send() -> None:
        if to is not None:
            mpi.Send(x, to)
        if come is not None:
            mpi.Recv(x, come)

    calls: dict[str, Run] = {
        "allreduce": lambda: mpi.Allreduce(MPI.IN_PLACE, x, how),
        "reduce": lambda: mpi.Reduce(MPI.IN_PLACE if root else x, x if root else None, how),
        "broadcast": lambda: mpi.Bcast(x),
        "allgather": lambda: mpi.Allgather(x, result),
        "reduce_scatter": lambda: mpi.Reduce_scatter_block(x, result, how),
        "gather": lambda: mpi.Gather(x, result if root else None),
        "scatter": lambda: mpi.Scatter(x if root else None, result),
        "alltoall": lambda: mpi.Alltoall(x, result),
        "send": send,
        "sendrecv": lambda: mpi.Sendrecv(
            x, (rank + 1) % size, recvbuf=result, source=(rank - 1) % size
        ),
    }
    return calls[collective]


@contextmanager
def gloo(comm: ringfold.Communicator) -> Iterator[Any]:
    """Open torch.distributed's default group on gloo, over the same ranks; collective."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    host = "127.0.0.1"
    if comm.node.size < comm.size:
        host = gather_texts(comm, socket.gethostbyname(socket.gethostname()))[0]
    else:
        # What gloo would take, the interface of the host's name, may not exist.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    port = np.zeros(1, np.int64)
    store = None
    if comm.rank == 0:
        store = dist.TCPStore(host, 0, comm.size, is_master=True, wait_for_workers=False)
        port[0] = store.port
    comm.broadcast(port)
    if store is None:
        store = dist.TCPStore(host, int(port[0]), comm.size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
    try:
        yield dist.group.WORLD
    finally:
        comm.barrier()
        dist.destroy_process_group()
        comm.barrier()  # the store is gone with rank 0


def gloo_run(comm: ringfold.Communicator, collective: str, buffers: Buffers, op: str) -> Run:
    """Return gloo's operation on the same memory as the arrays in `buffers`."""
    import torch
    import torch.distributed as dist

    x, result = (
        torch.from_numpy(array) if isinstance(array, np.ndarray) else array
        for array in (buffers.x, buffers.result)
    )
    how = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[op]
    rank, size = comm.rank, comm.size
    root = rank == 0
    to, come = partners(rank, size)

    def send() -> None:
        if to is not None:
            dist.send(x, to)
        if come is not None:
            dist.recv(x, come)

    def sendrecv() -> None:
        works = [dist.isend(x, (rank + 1) % size), dist.irecv(result, (rank - 1) % size)]
        for work in works:
            if work is not None:
                work.wait()

    # The older name warns where there is the newer one.
    newer = getattr(dist, "reduce_scatter_single", None)
    scatter_reduced = newer or dist.reduce_scatter_tensor

    def rows(flat: Any) -> list[Any]:
        return list(flat.view(size, -1).unbind())

    calls: dict[str, Run] = {
        "allreduce": lambda: dist.all_reduce(x, how),
        "reduce": lambda: dist.reduce(x, 0, how),
        "broadcast": lambda: dist.broadcast(x, 0),
        "allgather": lambda: dist.all_gather(rows(result), x),
        "reduce_scatter": lambda: scatter_reduced(result, x, how),
        "gather": lambda: dist.gather(x, rows(result) if root else None),
        "scatter": lambda: dist.scatter(result, rows(x) if root else None),
        "alltoall": lambda: dist.all_to_all_single(result, x),
        "send": send,
        "sendrecv": sendrecv,
    }
    return calls[collective]
