"""Fold an incoming array into a target: the arithmetic of every reducing collective."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from . import scalars
from .compiled import Kernel, compile_kernel, flat
from .elements import ELEMENTS, Element
from .operations import check_operation
from .storage import (
    FLOATS,
    HALVES,
    PARTS,
    STORAGE,
    Array,
    bits,
    check_array,
    check_divisor,
    parts,
    storage,
)

Fold = Callable[[Array, Array], None]

_FLOAT_OPS = {
    "sum": operator.add,
    "prod": operator.mul,
    "min": scalars.float_minimum,
    "max": scalars.float_maximum,
}
_INTEGER_OPS = {
    "sum": operator.add,
    "prod": operator.mul,
    "min": scalars.integer_minimum,
    "max": scalars.integer_maximum,
}
_BOOL_OPS = {"min": operator.and_, "max": operator.or_}

OPS: Mapping[str, Mapping[str, Callable[[Any, Any], Any]]] = MappingProxyType(
    {name: _INTEGER_OPS for name in STORAGE}
    | {name: _FLOAT_OPS for name in (*HALVES, *FLOATS, *PARTS)}
    | {"bool": _BOOL_OPS}
)


def _fold(
    operation: Callable[[Any, Any], Any], into: Element, incoming_element: Element
) -> Callable[[Array, Array], None]:
    widen, narrow, widen_incoming = into.widen, into.narrow, incoming_element.widen

    def fold(target: Array, incoming: Array) -> None:
        if target.size != incoming.size:
            raise ValueError("target and incoming differ in size", target.size, incoming.size)
        for i in range(target.size):
            target[i] = narrow(operation(widen(target[i]), widen_incoming(incoming[i])))

    return fold


@functools.cache
def combine_kernel(op: str, dtype: str) -> Kernel:
    """Return `combine(op, dtype)` as a compiled function, for calls from compiled code.

    It takes contiguous 1-d arrays; both half widths as uint16 bits, complex ones as their parts.
    """
    check_operation(op, dtype)
    element = ELEMENTS[dtype]
    return compile_kernel(
        f"combine_{op}_{dtype}",
        _fold(OPS[dtype][op], element, element),
        flat(element.type),
        flat(element.type, readonly=True),
    )


@functools.cache
def accumulate_kernel(op: str, dtype: str) -> Kernel:
    """Return `accumulate(op, dtype)` as a compiled function that takes half-width bits."""
    check_operation(op, dtype, among=HALVES)
    wide, half = ELEMENTS["float32"], ELEMENTS[dtype]
    return compile_kernel(
        f"accumulate_{op}_{dtype}",
        _fold(OPS[dtype][op], wide, half),
        flat(wide.type),
        flat(half.type, readonly=True),
    )


def _from_storage(kernel: Kernel, dtype: str) -> Fold:
    def fold(target: Array, incoming: Array) -> None:
        kernel(bits(target), bits(incoming))

    def fold_parts(target: Array, incoming: Array) -> None:
        kernel(parts(target), parts(incoming))

    # Numba has no float16 arrays on the host; all other storage goes in as it is.
    return fold_parts if dtype in PARTS else fold if dtype == "float16" else kernel


def combine(op: str, dtype: str) -> Fold:
    """Return the function (target, incoming) that sets target to `target op incoming`.

    Both are contiguous 1-d storage of `dtype`, equally long.  Half widths are combined in float32
    and rounded once; integers wrap; min and max hand on NaN and put -0.0 before 0.0, so they do not
    depend on the order of the ranks.  Compiled here, on first use.  TypeError if not in ALLOWED.
    """
    return _from_storage(combine_kernel(op, dtype), dtype)


def accumulate(op: str, dtype: str) -> Fold:
    """Return the function (target, incoming) that folds half-width storage into float32.

    `dtype` names the incoming half; the target is not rounded to it.
    """
    return _from_storage(accumulate_kernel(op, dtype), dtype)


@functools.cache
def divide_kernel(dtype: str) -> Kernel:
    """Return the compiled (target, divisor) for float32 or float64; the divisor has that type."""
    storage(dtype, FLOATS)
    element = ELEMENTS[dtype].type

    def divide_all(target: Array, divisor: Any) -> None:
        for i in range(target.size):
            target[i] = target[i] / divisor

    return compile_kernel(f"divide_{dtype}", divide_all, flat(element), element)


def divide(target: Array, divisor: float) -> None:
    """Divide an array of floats or complex numbers in place; each quotient is rounded once."""
    check_divisor(divisor)
    target = parts(target)
    dtype = target.dtype.name
    storage(dtype, FLOATS)
    check_array(target, dtype, "target", writes=True)
    divide_kernel(dtype)(target, target.dtype.type(divisor))
