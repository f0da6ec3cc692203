"""Remember what was decided for memory that a program passes again and again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .meeting import Meeting
    from .work import Prepared, Receipt

_CAPACITY = 256

Given = tuple[Any, ...]
"""What a collective takes besides the array: its op, root, or both."""


@dataclass(frozen=True, slots=True)
class Known:
    """A call that was made before, ready to run again.

    make: makes the result, where that is another array, for the next run to write to.
    shape, dtype: of the array, which is the same one as long as it has these and is contiguous; a
        tensor was compared when it was found.
    reference: to the array, which nothing else keeps alive.
    """

    meeting: Meeting
    receipt: Receipt
    make: Callable[[], Any] | None
    shape: tuple[int, ...] = ()
    dtype: Any = None
    reference: Any = None

    @classmethod
    def of(
        cls,
        prepared: Prepared,
        shape: tuple[int, ...] = (),
        dtype: Any = None,
        reference: Any = None,
    ) -> Known:
        """Return what is to be known of a call that is nothing but a meeting."""
        assert prepared.meeting is not None
        return cls(prepared.meeting, prepared.receipt, prepared.make, shape, dtype, reference)


class Memo:
    """The known calls of one communicator: on arrays by their identity, on tensors by their memory.

    Where gradients are made anew in every step, they come to lie where they lay before. What is
    known of an address stays right: memory that was registered stays so as long as the
    communicator, and any other may be read as what it was.

    barrier: the known call without an array.
    """

    def __init__(self) -> None:
        self._arrays: dict[tuple[int, str, Given], Known] = {}
        self._tensors: dict[tuple[Any, ...], Known] = {}
        self.find = self._arrays.get
        self.barrier: Known | None = None

    def at(self, x: Any, name: str, given: Given) -> Known | None:
        """Return what is known of a collective on a tensor over the same elements."""
        try:
            known = self._tensors.get((x.data_ptr(), x.shape, x.dtype, name, given))
        except (AttributeError, RuntimeError, TypeError):  # no tensor with memory, or no op
            return None
        if known is None or not (x.is_contiguous() and x.is_cpu) or x.is_neg() or x.is_conj():
            return None
        return known

    def add(self, x: Any, name: str, given: Given, prepared: Prepared) -> Known:
        """Remember the meeting of a collective on x, where x allows it."""
        if type(x) is np.ndarray and x.flags.carray:
            _make_room(self._arrays)
            key, forget = (id(x), name, given), self._arrays.pop
            # No other array has this identity before it is forgotten, and none moves its memory
            # while others refer to it; how it is seen may change.
            reference = weakref.ref(x, lambda _: forget(key, None))
            known = self._arrays[key] = Known.of(prepared, x.shape, x.dtype, reference)
            return known
        known = Known.of(prepared)
        if hasattr(x, "data_ptr") and x.is_contiguous():
            _make_room(self._tensors)
            self._tensors[x.data_ptr(), x.shape, x.dtype, name, given] = known
        return known

    def forget(self) -> None:
        """Know nothing any more."""
        self._arrays.clear()
        self._tensors.clear()
        self.barrier = None


def _make_room(known: dict[Any, Known]) -> None:
    if len(known) >= _CAPACITY:
        known.clear()
