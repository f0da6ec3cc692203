"""Remember what was decided for memory that a program passes again and again."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

_CAPACITY = 256

What = TypeVar("What")

Given = tuple[Any, ...]
"""What a call takes besides the array: of a collective its op, root, or both."""


@dataclass(slots=True)
class Known(Generic[What]):
    """What is known of a call that was made before.

    size, shape, dtype: of the array, which is the same one as long as it has these and is
        contiguous; a tensor was compared when it was found.
    reference: to the array, which nothing else keeps alive.
    """

    what: What
    size: int = 0
    shape: tuple[int, ...] = ()
    dtype: Any = None
    reference: Any = None


class Memo(Generic[What]):
    """The known calls of one communicator: on arrays by their identity, on tensors by their memory.

    Where gradients are made anew in every step, they come to lie where they lay before. What is
    known of an address stays right: memory that was registered stays so as long as the
    communicator, and any other may be read as what it was.
    """

    def __init__(self) -> None:
        self._arrays: dict[tuple[Any, ...], Known[What]] = {}
        self._tensors: dict[tuple[Any, ...], What] = {}
        self.find = self._arrays.get

    def recall(self, x: Any, name: str, given: Given) -> What | None:
        """Return what is known of a call on x."""
        try:
            known = self.find((id(x), name, *given))
        except TypeError:  # an op that is no name, such as a second array
            return None
        if known is not None:
            as_before = x.flags.carray and x.shape == known.shape and x.dtype is known.dtype
            return known.what if as_before else None
        return self.at(x, name, given)

    def at(self, x: Any, name: str, given: Given) -> What | None:
        """Return what is known of a call on a tensor over the same elements."""
        try:
            what = self._tensors.get((x.data_ptr(), x.shape, x.dtype, name, given))
        except (AttributeError, RuntimeError, TypeError):  # no tensor with memory, or no op
            return None
        if what is None or not (x.is_contiguous() and x.is_cpu) or x.is_neg() or x.is_conj():
            return None
        return what

    def add(self, x: Any, name: str, given: Given, what: What) -> What:
        """Remember what runs a call on x again, where x allows it; it may keep no memory alive."""
        if type(x) is np.ndarray and x.flags.carray:
            _make_room(self._arrays)
            key, forget = (id(x), name, *given), self._arrays.pop
            # No other array has this identity before it is forgotten, and none moves its memory
            # while others refer to it; how it is seen may change.
            reference = weakref.ref(x, lambda _: forget(key, None))
            self._arrays[key] = Known(what, x.size, x.shape, x.dtype, reference)
        elif hasattr(x, "data_ptr") and x.is_contiguous():
            _make_room(self._tensors)
            self._tensors[x.data_ptr(), x.shape, x.dtype, name, given] = what
        return what

    def forget(self) -> None:
        """Know nothing any more."""
        self._arrays.clear()
        self._tensors.clear()


def _make_room(known: dict[Any, Any]) -> None:
    if len(known) >= _CAPACITY:
        known.clear()
