"""Each dtype as the compiler sees it: its type in memory and the way to and from arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numba

from . import scalars
from .storage import PARTS, STORAGE


class Element(NamedTuple):
    """How one dtype is stored, computed with and checked.

    `scalar` is the NumPy type in memory, `widen` and `narrow` lead to the arithmetic type and back,
    `is_finite` takes what is stored. `scalars` of them are one element: two of a complex number.
    """

    scalar: Any
    widen: Callable[[Any], Any] = scalars.identity
    narrow: Callable[[Any], Any] = scalars.identity
    is_finite: Callable[[Any], Any] = scalars.float_is_finite
    scalars: int = 1

    @property
    def type(self) -> Any:
        """The Numba type in memory."""
        return numba.from_dtype(self.scalar)


ELEMENTS: Mapping[str, Element] = MappingProxyType(
    {name: Element(dtype.type) for name, dtype in STORAGE.items()}
    | {
        "float16": Element(
            STORAGE["bfloat16"].type,
            scalars.float16_to_float32,
            scalars.float32_to_float16,
            scalars.float16_is_finite,
        ),
        "bfloat16": Element(
            STORAGE["bfloat16"].type,
            scalars.bfloat16_to_float32,
            scalars.float32_to_bfloat16,
            scalars.bfloat16_is_finite,
        ),
    }
    | {name: Element(STORAGE[part].type, scalars=2) for name, part in PARTS.items()}
)
