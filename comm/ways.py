"""Tell which way data goes between each pair of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .operations import Operations

if TYPE_CHECKING:
    from .communicator import Communicator
    from .device_ways import DeviceWays


def shares_memory(comm: Communicator) -> str | None:
    """Return why this rank's node shares no memory: empty where it does, None where not asked."""
    nodes = comm._nodes
    if nodes is None:
        return None
    return "" if nodes.token else nodes.reason


def host_ways(comm: Communicator) -> list[list[str]]:
    """Return the way of collectives on host memory from each rank to each; collective."""
    nodes = comm._nodes
    token = nodes.token if nodes is not None else 0
    tokens = comm.allgather(np.array([token], np.int64)).ravel().tolist()
    messages = f"{comm._transport.name} messages"
    return [
        ["shared memory" if mine and mine == other else messages for other in tokens]
        for mine in tokens
    ]


def device_ways(comm: Communicator, x: Any) -> list[list[str]]:
    """Return the way of messages in GPU memory between each two ranks; collective.

    x: an array of this rank in GPU memory. Each end of a message decides for itself.

    Raises: ValueError where x is in host memory.
    """
    side = _device_side(comm, x)
    others = _device_side(comm.node, x) if comm.node.size < comm.size else side
    opens = comm.node.size > 1 and others.opens(x)
    mail = comm.host_operations.by_mail

    def way_to(rank: int) -> int:
        if rank == comm.rank:
            return 0
        return _IPC if opens and mail(rank) else int(side.way_to(rank) is None)

    ends = comm.allgather(np.array([way_to(rank) for rank in range(comm.size)], np.int64))
    return [[_WAYS[both] for both in row] for row in (ends + ends.T).tolist()]


def _device_side(comm: Communicator, x: Any) -> DeviceWays:
    side = comm._side(x)
    if isinstance(side, Operations):
        raise ValueError("x: expected an array in GPU memory, got one in host memory")
    return side


_IPC = 3
_WAYS = {
    0: "staged",
    1: "gpu-aware mpi at one end",
    2: "gpu-aware mpi",
    _IPC: "staged",
    2 * _IPC: "ipc",
}
"""What both ends can do, added up: one of them alone cannot use ipc."""
