"""Keep what a function has returned, bounded by bytes: tables grow with buffers and ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, ParamSpec

import numpy.typing as npt

Parameters = ParamSpec("Parameters")
Array = npt.NDArray[Any]


class ByteCache(Generic[Parameters]):
    """Remember the arrays that a pure function returns, and forget the oldest first.

    most: bytes of all that are remembered; the newest one is, however large.
    """

    def __init__(self, make: Callable[Parameters, Array], most: int) -> None:
        self._make, self._most = make, most
        self._kept: dict[object, Array] = {}
        self._lock = threading.Lock()  # ranks may be threads
        self.nbytes = 0

    def __call__(self, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Array:
        """Return the array; of two threads that ask at once each may make it."""
        key = (args, tuple(kwargs.items())) if kwargs else args
        known = self._kept.get(key)  # no lock, and no note of who asked last: it is asked often
        if known is not None:
            return known
        made = self._make(*args, **kwargs)
        with self._lock:
            self.nbytes += made.nbytes - getattr(self._kept.pop(key, None), "nbytes", 0)
            self._kept[key] = made
            while self.nbytes > self._most and len(self._kept) > 1:
                self.nbytes -= self._kept.pop(next(iter(self._kept))).nbytes
        return made
