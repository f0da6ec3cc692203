"""Exchange plain Python values between the ranks of one job, as pickles."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["broadcast_object", "gather_objects"]


def gather_objects(comm: Communicator, value: Any) -> list[Any]:
    """Return the values of all ranks, by rank; collective."""
    text = np.frombuffer(pickle.dumps(value), dtype=np.uint8)
    lengths = comm.allgather(np.array([text.size], dtype=np.int64))[:, 0]
    padded = np.zeros(int(lengths.max()), dtype=np.uint8)
    padded[: text.size] = text
    rows = comm.allgather(padded)
    return [pickle.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]


def broadcast_object(comm: Communicator, value: Any, root: int) -> Any:
    """Return root's value; collective. On root it is the value itself."""
    text = pickle.dumps(value) if comm.rank == root else b""
    length = comm.broadcast(np.array([len(text)], dtype=np.int64), root=root)
    data = np.zeros(int(length[0]), dtype=np.uint8)
    data[: len(text)] = np.frombuffer(text, dtype=np.uint8)
    comm.broadcast(data, root=root)
    return value if comm.rank == root else pickle.loads(data.tobytes())
