"""Keep what a function has returned last, bounded by bytes: tables grow with buffers and ranks."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, ParamSpec

import numpy.typing as npt

Parameters = ParamSpec("Parameters")
Array = npt.NDArray[Any]


class ByteCache(Generic[Parameters]):
    """Call a function whose results follow from its arguments, once for those asked for lately.

    most: bytes of the arrays that are kept; the last one is, whatever it takes.
    """

    def __init__(self, make: Callable[Parameters, Array], most: int) -> None:
        self._make, self._most = make, most
        self._kept: OrderedDict[object, Array] = OrderedDict()
        self._lock = threading.Lock()  # ranks may be threads
        self.nbytes = 0

    def __call__(self, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Array:
        """Return the array; of two threads that ask at once each may make it."""
        key = args, tuple(kwargs.items())
        with self._lock:
            if (known := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return known
        made = self._make(*args, **kwargs)
        with self._lock:
            self.nbytes += made.nbytes - getattr(self._kept.get(key), "nbytes", 0)
            self._kept[key] = made
            while self.nbytes > self._most and len(self._kept) > 1:
                self.nbytes -= self._kept.popitem(last=False)[1].nbytes
        return made
