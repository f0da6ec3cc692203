"""A user's program with types: `make lint` has mypy judge it beside the installed package."""

from __future__ import annotations

from typing import Any, assert_type

import numpy as np
import torch
from numpy.typing import NDArray

import ringfold
from ringfold.parallel import (
    allgather_objects,
    broadcast_object,
    gather_objects,
    scatter_objects,
)


def collectives(comm: ringfold.Communicator, later: bool) -> None:
    x: NDArray[np.float32] = np.ones(8, np.float32)
    row = torch.ones(8)
    assert_type(comm.allreduce(x, "mean"), NDArray[np.float32])
    assert_type(comm.reduce(x), NDArray[np.float32])
    assert_type(comm.broadcast(row, root=0), torch.Tensor)
    assert_type(comm.recv(row, 0), torch.Tensor)
    assert_type(comm.sendrecv(x, 0, row, None), torch.Tensor)
    for work in (
        comm.allreduce(x, blocking=False),
        comm.reduce(x, blocking=False),
        comm.broadcast(x, blocking=False),
        comm.allgather(x, blocking=False),
        comm.reduce_scatter(x, blocking=False),
        comm.gather(x, blocking=False),
        comm.scatter(x, blocking=False),
        comm.alltoall(x, blocking=False),
        comm.barrier(blocking=False),
        comm.isend(x, 0),
    ):
        assert_type(work, ringfold.Work)
    assert_type(comm.allreduce(x, blocking=later), Any)
    assert_type(comm.allgather(x, blocking=later), Any)


def groups(comm: ringfold.Communicator, color: int | None) -> None:
    assert_type(comm.split(0), ringfold.Communicator)
    assert_type(comm.split(color), ringfold.Communicator | None)


def objects(comm: ringfold.Communicator) -> None:
    assert_type(broadcast_object({"a": 1} if comm.rank == 0 else None, comm), dict[str, int])
    assert_type(broadcast_object("a", comm), str)
    assert_type(allgather_objects(comm.rank, comm), list[int])
    assert_type(gather_objects("a", comm), list[str] | None)
    assert_type(scatter_objects(range(comm.size), comm), int)
