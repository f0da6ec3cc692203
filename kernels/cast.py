"""Change the width of a whole array: half storage to float32 and back."""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np

from .compiled import Kernel, compile_kernel, flat
from .elements import ELEMENTS
from .storage import HALVES, Array, bits, check_array, check_divisor, check_same_size, storage


@functools.cache
def widen_kernel(dtype: str) -> Kernel:
    """Return the compiled (source bits, target float32) for a half-width `dtype`, equally long."""
    storage(dtype, HALVES)
    element = ELEMENTS[dtype]
    widen_one = element.widen

    def widen_all(source: Array, target: Array) -> None:
        for i in range(source.size):
            target[i] = widen_one(source[i])

    return compile_kernel(
        f"widen_{dtype}", widen_all, flat(element.type, readonly=True), flat(numba.float32)
    )


@functools.cache
def narrow_kernel(dtype: str) -> Kernel:
    """Return the compiled (source float32, target bits, float32 divisor), equally long."""
    storage(dtype, HALVES)
    element = ELEMENTS[dtype]
    narrow_one = element.narrow

    def narrow_all(source: Array, target: Array, divisor: Any) -> None:
        for i in range(source.size):
            target[i] = narrow_one(source[i] / divisor)

    return compile_kernel(
        f"narrow_{dtype}",
        narrow_all,
        flat(numba.float32, readonly=True),
        flat(element.type),
        numba.float32,
    )


def widen(source: Array, target: Array, dtype: str) -> None:
    """Write half-width storage of `dtype` into a float32 array; exact, NaN stays NaN."""
    storage(dtype, HALVES)
    check_array(source, dtype, "source")
    check_array(target, "float32", "target", writes=True)
    check_same_size(source, target, ("source", "target"))
    widen_kernel(dtype)(bits(source), target)


def narrow(source: Array, target: Array, dtype: str, divisor: float = 1.0) -> None:
    """Write float32 values over `divisor` into half-width storage of `dtype`.

    The quotient is a float32; then it is rounded to nearest, ties to even.  What is too large
    becomes infinite, NaN stays NaN (its payload may change).
    """
    storage(dtype, HALVES)
    check_array(source, "float32", "source")
    check_array(target, dtype, "target", writes=True)
    check_same_size(source, target, ("source", "target"))
    check_divisor(divisor)
    narrow_kernel(dtype)(source, bits(target), np.float32(divisor))
