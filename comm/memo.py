"""Remember what was decided for arrays that a program passes again and again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .meeting import Meeting
    from .work import Receipt

_CAPACITY = 256


@dataclass(frozen=True, slots=True)
class Known:
    """A call that was made before, ready to run again as long as the array is what it was.

    fits: tell whether the array lies over the same memory as then. reference: to the array.
    """

    fits: Callable[[Any], bool]
    reference: Any
    meeting: Meeting
    receipt: Receipt


class Memo:
    """The known calls of one communicator, by the identity of their array; keeps no array alive."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], Known] = {}
        self.find = self._known.get

    def add(self, x: Any, op: str, meeting: Meeting, receipt: Receipt) -> Known:
        """Remember the meeting of a call on x, where x allows it."""
        if len(self._known) >= _CAPACITY:
            self._known.clear()
        key = id(x), op
        try:  # no other array has this identity before this one is forgotten
            reference = weakref.ref(x, lambda _: self._known.pop(key, None))
        except TypeError:  # such as a memoryview
            return Known(_never, None, meeting, receipt)
        fits = _numpy_fits(x) if type(x) is np.ndarray else _tensor_fits(x)
        known = Known(fits, reference, meeting, receipt)
        self._known[key] = known
        return known

    def forget(self) -> None:
        """Know nothing any more."""
        self._known.clear()


def _never(_: Any) -> bool:
    return False


def _numpy_fits(x: np.ndarray[Any, Any]) -> Callable[[Any], bool]:
    """An array that others refer to keeps its memory; how it is seen may change."""
    size, dtype = x.size, x.dtype

    def fits(y: np.ndarray[Any, Any]) -> bool:
        return y.flags.carray and y.size == size and y.dtype is dtype

    return fits


def _tensor_fits(x: Any) -> Callable[[Any], bool]:
    if not hasattr(x, "data_ptr") or not hasattr(x, "is_contiguous"):
        return _never
    address, count, dtype = x.data_ptr(), x.numel(), x.dtype

    def fits(y: Any) -> bool:
        return (
            y.data_ptr() == address
            and y.numel() == count
            and y.dtype is dtype
            and y.is_contiguous()
        )

    return fits
