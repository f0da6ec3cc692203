"""Exchange Python values between the ranks of one job, as pickles; needs no torch."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from .demands import require_comm

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

Value = TypeVar("Value")

__all__ = ["allgather_objects", "broadcast_object"]


def allgather_objects(value: Value, comm: Communicator) -> list[Value]:
    """Return the values of all ranks, by rank; collective.

    Raises: TypeError, on every rank, for a value that has no pickle.
    """
    require_comm(comm)
    text, error = _pickled(value)
    described = comm.allgather(_describe(text, error))
    joined = comm.allgatherv(text)
    texts = [part.tobytes() for part in np.split(joined, np.cumsum(described[:-1, 0]))]
    for rank, (text_of, failed) in enumerate(zip(texts, described[:, 1], strict=True)):
        if failed:
            raise _refusal(rank, text_of) from error
    return [pickle.loads(text_of) for text_of in texts]


def broadcast_object(value: Value | None, comm: Communicator, root: int = 0) -> Value:
    """Return root's value; collective. On root it is the value itself, elsewhere any will do.

    Raises: TypeError, on every rank, for a value that has no pickle.
    """
    require_comm(comm)
    nothing = np.zeros(0, np.uint8), None
    text, error = _pickled(value) if comm.rank == root else nothing
    length, failed = comm.broadcast(_describe(text, error), root=root)
    data = np.zeros(int(length), dtype=np.uint8)
    data[: text.size] = text
    comm.broadcast(data, root=root)
    if failed:
        raise _refusal(root, data.tobytes()) from error
    return cast("Value", value if comm.rank == root else pickle.loads(data.tobytes()))


def _pickled(value: Any) -> tuple[NDArray[np.uint8], Exception | None]:
    """Return the pickle of a value, or what is wrong with it as text, and as the error."""
    try:
        text, error = pickle.dumps(value), None
    except Exception as raised:  # whatever the value's own methods raise
        text, error = f"{type(raised).__name__}: {raised}".encode(errors="backslashreplace"), raised
    return np.frombuffer(text, dtype=np.uint8), error


def _describe(text: NDArray[np.uint8], error: Exception | None) -> NDArray[np.int64]:
    return np.array([text.size, error is not None], dtype=np.int64)


def _refusal(rank: int, text: bytes) -> TypeError:
    return TypeError(f"a value of rank {rank} cannot be sent, as it has no pickle: {text.decode()}")
