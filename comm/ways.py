"""Tell which way data goes between each pair of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .operations import Operations

if TYPE_CHECKING:
    from .communicator import Communicator


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
    side = comm._side(x)
    if isinstance(side, Operations):
        raise ValueError("x: expected an array in GPU memory, got one in host memory")
    direct = [rank != comm.rank and side.way_to(rank) is None for rank in range(comm.size)]
    ends = comm.allgather(np.array(direct, np.int64))
    named = ("staged", "gpu-aware mpi at one end", "gpu-aware mpi")
    return [[named[count] for count in row] for row in (ends + ends.T).tolist()]
