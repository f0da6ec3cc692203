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

_HEAD = 16
_NOTHING = np.zeros(0, np.uint8)

__all__ = ["allgather_objects", "broadcast_object"]


def allgather_objects(value: Value, comm: Communicator) -> list[Value]:
    """Return the values of all ranks, by rank; collective.

    Raises: TypeError, on every rank, for a value that has no pickle.
    """
    require_comm(comm)
    text, error = _pickled(value)
    joined = comm.allgatherv(np.concatenate([_headed(text, error), text]))
    texts = []
    for rank in range(comm.size):
        length, failed = _read(joined)
        texts.append(joined[_HEAD : _HEAD + length].tobytes())
        joined = joined[_HEAD + length :]
        if failed:
            raise _refusal(rank, texts[rank]) from error
    return [pickle.loads(text_of) for text_of in texts]


def broadcast_object(value: Value | None, comm: Communicator, root: int = 0) -> Value:
    """Return root's value; collective. On root it is the value itself, elsewhere any will do.

    Raises: TypeError, on every rank, for a value that has no pickle.
    """
    require_comm(comm)
    letters = comm.letters(1)
    letter = letters[0]
    text, error = _pickled(value) if comm.rank == root else (_NOTHING, None)
    if comm.rank == root:
        first = text[: letter.size - _HEAD]
        letter[:_HEAD] = _headed(text, error)
        letter[_HEAD : _HEAD + first.size] = first
    comm.broadcast(letters, root=root)
    length, failed = _read(letter)
    if comm.rank != root:
        text = letter[_HEAD : _HEAD + length].copy()
    comm.give_back(letters)
    if length > letter.size - _HEAD:  # then all of it once more
        text = text if comm.rank == root else np.empty(length, np.uint8)
        comm.broadcast(text, root=root)
    if failed:
        raise _refusal(root, text.tobytes()) from error
    return cast("Value", value if comm.rank == root else pickle.loads(text.tobytes()))


def _pickled(value: Any) -> tuple[NDArray[np.uint8], Exception | None]:
    """Return the pickle of a value, or what is wrong with it as text, and as the error."""
    try:
        text, error = pickle.dumps(value), None
    except Exception as raised:  # whatever the value's own methods raise
        text, error = _told(raised).encode(errors="backslashreplace"), raised
    return np.frombuffer(text, dtype=np.uint8), error


def _told(error: Exception) -> str:
    """Return an error as text, also where it cannot say itself what it is."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def _headed(text: NDArray[np.uint8], error: Exception | None) -> NDArray[np.uint8]:
    """Return what comes before a text: its length, and whether it tells of an error."""
    return np.array([text.size, error is not None], dtype=np.int64).view(np.uint8)


def _read(words: NDArray[np.uint8]) -> tuple[int, bool]:
    length, failed = words[:_HEAD].view(np.int64).tolist()
    return length, bool(failed)


def _refusal(rank: int, text: bytes) -> TypeError:
    return TypeError(f"a value of rank {rank} cannot be sent, as it has no pickle: {text.decode()}")
