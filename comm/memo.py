"""Remember what was decided for memory that a program passes again and again."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .meeting import Meeting
    from .work import Receipt

_CAPACITY = 256


@dataclass(frozen=True, slots=True)
class Known:
    """A call that was made before, ready to run again.

    size, dtype: of the array, which is the same one as long as it has these and is contiguous; a
        tensor was compared when it was found.
    reference: to the array, which nothing else keeps alive.
    """

    meeting: Meeting
    receipt: Receipt
    size: int = 0
    dtype: Any = None
    reference: Any = None


class Memo:
    """The known calls of one communicator: on arrays by their identity, on tensors by their memory.

    Where gradients are made anew in every step, they come to lie where they lay before. What is
    known of an address stays right: memory that was registered stays so as long as the
    communicator, and any other may be read as what it was.
    """

    def __init__(self) -> None:
        self._arrays: dict[tuple[int, str], Known] = {}
        self._tensors: dict[tuple[Any, ...], Known] = {}
        self.find = self._arrays.get

    def at(self, x: Any, op: str) -> Known | None:
        """Return what is known of a tensor over the same elements."""
        try:
            known = self._tensors.get((x.data_ptr(), x.numel(), x.dtype, op))
        except (AttributeError, RuntimeError, TypeError):  # no tensor with memory, or no op
            return None
        if known is None or not (x.is_contiguous() and x.is_cpu) or x.is_neg():
            return None
        return known

    def add(self, x: Any, op: str, meeting: Meeting, receipt: Receipt) -> Known:
        """Remember the meeting of a call on x, where x allows it."""
        if type(x) is np.ndarray and x.flags.carray:
            return self._add_array(x, op, meeting, receipt)
        known = Known(meeting, receipt)
        if hasattr(x, "data_ptr") and x.is_contiguous():
            _make_room(self._tensors)
            self._tensors[x.data_ptr(), x.numel(), x.dtype, op] = known
        return known

    def _add_array(
        self, x: np.ndarray[Any, Any], op: str, meeting: Meeting, receipt: Receipt
    ) -> Known:
        _make_room(self._arrays)
        key, forget = (id(x), op), self._arrays.pop
        # No other array has this identity before it is forgotten, and none moves its memory while
        # others refer to it; how it is seen may change.
        reference = weakref.ref(x, lambda _: forget(key, None))
        known = self._arrays[key] = Known(meeting, receipt, x.size, x.dtype, reference)
        return known

    def forget(self) -> None:
        """Know nothing any more."""
        self._arrays.clear()
        self._tensors.clear()


def _make_room(known: dict[Any, Known]) -> None:
    if len(known) >= _CAPACITY:
        known.clear()
