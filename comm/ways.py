"""Tell which way data goes between each pair of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

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
