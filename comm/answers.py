"""Ask a rule about an array of ranks; refuse a wrong answer with its method and what it returned.

Rules are never asked about one rank, as an int: the same code may answer differently then. `~`, for
one, negates the truth values of an array, but inverts the bits of an int.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ScheduleError
from .schedule import Chunks, Peers, Ranks

Integers = npt.NDArray[np.int64]

_OF_ARRAYS = ("truth value", "read-only", "scalar", "unhashable type: 'numpy.ndarray'")
"""What NumPy says where code for one rank is given an array."""


def dst_of(peers: Peers, rank: Integers, size: int) -> Integers:
    """Return whom ranks send to; ScheduleError where that is no whole number for each."""
    name = f"{type(peers).__name__}.dst"
    return _whole_numbers(name, _asked(name, peers.dst, rank, size), rank)


def src_of(peers: Peers, rank: Integers, size: int) -> Integers:
    """Return whom ranks receive from; ScheduleError as of `dst_of`."""
    name = f"{type(peers).__name__}.src"
    return _whole_numbers(name, _asked(name, peers.src, rank, size), rank)


def span_of(
    chunks: Chunks, rank: Integers, size: int, num_chunks: int
) -> tuple[Integers, Integers]:
    """Return (first, length) of ranks; ScheduleError for no pair, as the firsts of two ranks."""
    name = f"{type(chunks).__name__}.span"
    told = _asked(name, chunks.span, rank, size, num_chunks)
    if not isinstance(told, tuple | list) or len(told) != 2:
        count = f" of {len(told)}" if isinstance(told, tuple | list) else ""
        raise ScheduleError(
            f"{name} returned a {type(told).__name__}{count}, expected two parts: (first, length)"
        )
    first, length = told
    return (
        _whole_numbers(f"{name}, for its first,", first, rank),
        _whole_numbers(f"{name}, for its length,", length, rank),
    )


@contextmanager
def in_round(index: int | None) -> Iterator[None]:
    """Add the round, where it is known, to a ScheduleError that does not name one yet."""
    try:
        yield
    except ScheduleError as error:
        if index is None or error.round is not None:
            raise
        raise ScheduleError(str(error), round=index) from error


def _asked(name: str, method: Callable[..., Any], rank: Integers, *numbers: int) -> Any:
    try:
        return method(rank, *numbers)
    except ScheduleError:
        raise
    except Exception as error:
        hint = ""
        if any(words in str(error) for words in _OF_ARRAYS):
            hint = (
                "; it is given a read-only array, never one rank: np.where instead of `if`, and a "
                "new array instead of a changed one"
            )
        raise ScheduleError(
            f"{name} cannot be evaluated at an array of {rank.size} ranks "
            f"({type(error).__name__}: {error}){hint}"
        ) from error


def _whole_numbers(name: str, told: Ranks, rank: Integers) -> Integers:
    """Return a number for each rank, of an answer that holds one for all or one for each."""
    try:
        found = np.asarray(told)
        # Floats and objects may be whole numbers; those without a sign, beyond what has one.
        numbers = found if found.dtype.kind in "bi" else _as_integers(found)
    except (TypeError, ValueError, OverflowError):
        raise ScheduleError(f"{name} returned {told!r:.80}, expected {_expected(rank)}") from None
    if numbers.shape not in ((), (1,), rank.shape):
        raise ScheduleError(
            f"{name} returned an array of shape {numbers.shape}, expected {_expected(rank)}"
        )
    if numbers is not found:
        wrong = np.flatnonzero(numbers != found)
        if wrong.size:
            at = int(wrong[0])
            where = f" for rank {rank[at]}" if found.shape == rank.shape else ""
            raise ScheduleError(
                f"{name} returned {found.flat[at]}{where}, expected {_expected(rank)}; `//` "
                "divides to whole numbers"
            )
    whole: Integers = numbers.astype(np.int64, copy=False)
    return whole if whole.shape == rank.shape else np.broadcast_to(whole, rank.shape)


def _as_integers(found: npt.NDArray[Any]) -> Integers:
    """Return the integers that values are nearest to, or raise a TypeError, say."""
    if found.dtype.kind not in "ufO":
        raise TypeError("no numbers")
    with np.errstate(invalid="ignore"):
        return found.astype(np.int64)


def _expected(rank: Integers) -> str:
    return f"a whole number for each of {rank.size} ranks, or one for all"
