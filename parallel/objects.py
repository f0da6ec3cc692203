"""Exchange Python values between the ranks of one job, as pickles; needs no torch."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from ..comm.errors import MismatchError
from ..comm.texts import listed
from .demands import require_comm

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

Value = TypeVar("Value")

_HEAD = 16
_NOTHING = np.zeros(0, np.uint8)

__all__ = [
    "allgather_objects",
    "broadcast_object",
    "gather_objects",
    "recv_object",
    "scatter_objects",
    "send_object",
]


def allgather_objects(value: Value, comm: Communicator) -> list[Value]:
    """Return the values of all ranks, by rank; collective.

    Raises: TypeError, on every rank, for a value that has no pickle.
    """
    require_comm(comm)
    text, error = _pickled(value)
    return _values(comm.allgatherv(_framed(text, error)), comm.size, error)


def gather_objects(value: Value, comm: Communicator, root: int = 0) -> list[Value] | None:
    """Return, at root, the values of all ranks, by rank; None on the other ranks. Collective.

    Raises: TypeError, at root and on the value's own rank, for one that has no pickle.
    """
    require_comm(comm)
    text, error = _pickled(value)
    joined = comm.gatherv(_framed(text, error), root)
    if joined is not None:
        return _values(joined, comm.size, error)
    if error is not None:
        raise _refusal(comm.rank, text.tobytes()) from error
    return None


def scatter_objects(values: Iterable[Value] | None, comm: Communicator, root: int = 0) -> Value:
    """Return the value that root has for this rank; collective.

    values: at root one for each rank, the first for rank 0; elsewhere any will do.

    Raises: TypeError, on every rank, for a value that has no pickle; MismatchError for roots that
    differ; at root, ValueError for another number of values, TypeError for what is not iterable.
    """
    require_comm(comm)
    root, error = comm.host_operations.root(root), None
    parts: list[NDArray[np.uint8]] = [_NOTHING] * comm.size
    if comm.rank == root:
        pickled = [_pickled(value) for value in _listed(values, comm.size)]
        failed = [one for one in pickled if one[1] is not None]
        if failed:  # which every rank is told
            error, pickled = failed[0][1], failed[:1] * comm.size
        parts = [_framed(*one) for one in pickled]
    rows, counts = comm.alltoallv(np.concatenate(parts), [part.size for part in parts])
    roots = [rank for rank, count in enumerate(counts) if count]
    if roots != [root]:
        raise MismatchError(
            f"scatter_objects: rank {comm.rank} expects a value of rank {root}, values came from "
            f"ranks {listed(roots)}"
        )
    return cast("Value", _values(rows, 1, error, root)[0])


def send_object(value: Any, dst: int, comm: Communicator, tag: int = 0) -> None:
    """Send a value to rank dst, which takes it by `recv_object`; may wait for that, as `send`.

    Raises: TypeError for a value that has no pickle; nothing is sent then.
    """
    require_comm(comm)
    text, error = _pickled(value)
    if error is not None:
        raise _refusal(comm.rank, text.tobytes()) from error
    letters = comm.letters(1)
    room = letters.size - _HEAD
    _write(letters[0], text, error)
    comm.send(letters, dst, tag)
    comm.give_back(letters)
    if text.size > room:
        comm.send(text[room:], dst, tag)


def recv_object(src: int, comm: Communicator, tag: int = 0) -> Any:
    """Return the next value that rank src sends by `send_object` with this tag."""
    require_comm(comm)
    letters = comm.letters(1)
    room = letters.size - _HEAD
    comm.recv(letters, src, tag)
    length, _ = _read(letters[0])
    text = np.empty(length, np.uint8)
    text[:room] = letters[0, _HEAD : _HEAD + min(length, room)]
    comm.give_back(letters)
    if length > room:
        comm.recv(text[room:], src, tag)
    return pickle.loads(text.data)


def broadcast_object(value: Value | None, comm: Communicator, root: int = 0) -> Value:
    """Return root's value; collective. On root it is the value itself, elsewhere any will do.

    Raises: TypeError, on every rank, for a value that has no pickle.
    """
    require_comm(comm)
    letters = comm.letters(1)
    letter = letters[0]
    text, error = _pickled(value) if comm.rank == root else (_NOTHING, None)
    if comm.rank == root:
        _write(letter, text, error)
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


def _listed(values: Iterable[Value] | None, size: int) -> list[Value]:
    """Return a value for each rank, or raise what is wrong with them."""
    try:
        given = list(cast("Iterable[Value]", values))
    except TypeError:
        raise TypeError(
            f"values: expected {size}, one for each rank, got {type(values).__name__}"
        ) from None
    if len(given) != size:
        raise ValueError(f"values: expected {size}, one for each rank, got {len(given)}")
    return given


def _values(
    joined: NDArray[np.uint8], count: int, error: Exception | None, first: int = 0
) -> list[Any]:
    """Return the values of `count` headed texts; raise the refusal if one holds that instead.

    error: this rank's own, as the cause.  first: the rank that the first text comes from.
    """
    texts = []
    for rank in range(first, first + count):
        length, failed = _read(joined)
        text, joined = joined[_HEAD : _HEAD + length], joined[_HEAD + length :]
        if failed:
            raise _refusal(rank, text.tobytes()) from error
        texts.append(text)
    return [pickle.loads(text.data) for text in texts]


def _pickled(value: Any) -> tuple[NDArray[np.uint8], Exception | None]:
    """Return a value's pickle and None; or an error as text, and itself, where it has none."""
    try:
        text, error = pickle.dumps(value), None
    except Exception as raised:  # whatever the value's own methods raise
        text, error = _told(raised).encode(errors="backslashreplace"), raised
    return np.frombuffer(text, dtype=np.uint8), error


def _told(error: Exception) -> str:
    """Return an error as text, even if its own __str__ raises."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def _headed(text: NDArray[np.uint8], error: Exception | None) -> NDArray[np.uint8]:
    """Return what comes before a text: its length, and whether it tells of an error."""
    return np.array([text.size, error is not None], dtype=np.int64).view(np.uint8)


def _framed(text: NDArray[np.uint8], error: Exception | None) -> NDArray[np.uint8]:
    return np.concatenate([_headed(text, error), text])


def _write(letter: NDArray[np.uint8], text: NDArray[np.uint8], error: Exception | None) -> None:
    """Write as much of a headed text to a letter as fits."""
    first = text[: letter.size - _HEAD]
    letter[:_HEAD] = _headed(text, error)
    letter[_HEAD : _HEAD + first.size] = first


def _read(words: NDArray[np.uint8]) -> tuple[int, bool]:
    length, failed = words[:_HEAD].view(np.int64).tolist()
    return length, bool(failed)


def _refusal(rank: int, text: bytes) -> TypeError:
    return TypeError(f"a value of rank {rank} cannot be sent, as it has no pickle: {text.decode()}")
