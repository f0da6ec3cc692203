"""Arithmetic on one piece of memory as C functions, for compiled code that only knows addresses.

Every function is int64 f(int64 record) and returns 0. The record is PIECE_WORDS int64: address of
the target, address of what comes in, how many elements, and a divisor as float64 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba.np.numpy_support import carray

from .compiled import compile_callback
from .elements import ELEMENTS
from .message_words import PIECE_WORDS
from .operations import check_operation
from .reduce import OPS
from .scalars import compiled, divide, identity, keep, pointer_to
from .storage import HALVES, storage


def _piecewise(
    operation: Callable[[Any, Any], Any],
    into: tuple[Any, Callable[[Any], Any], Callable[[Any], Any]],
    incoming: tuple[Any, Callable[[Any], Any]],
    scale: Callable[[Any, Any], Any],
    scalars: int = 1,
) -> Callable[[Any], Any]:
    """Return target = narrow(operation(widen(target), scale(widen(incoming), divisor)))."""
    stored, widen, narrow = into
    arriving, widen_incoming = incoming

    def piece(record: Any) -> Any:
        words = carray(pointer_to(record, np.int64), PIECE_WORDS)
        divisor = np.float32(carray(pointer_to(record, np.float64), PIECE_WORDS)[3])
        count = words[2] * scalars
        target = carray(pointer_to(words[0], stored), count)
        source = carray(pointer_to(words[1], arriving), count)
        for i in range(target.size):
            value = scale(widen_incoming(source[i]), divisor)
            target[i] = stored(narrow(operation(widen(target[i]), value)))
        return 0

    return piece


@compiled
def _second(_first: Any, second: Any) -> Any:
    return second


@functools.cache
def combine_callback(op: str, dtype: str) -> int:
    """Return the address of `combine(op, dtype)` of `kernels.reduce`; the divisor is not used."""
    check_operation(op, dtype)
    element = ELEMENTS[dtype]
    function = _piecewise(
        OPS[dtype][op],
        (element.scalar, element.widen, element.narrow),
        (element.scalar, element.widen),
        keep,
        element.scalars,
    )
    return compile_callback(f"piece_combine_{op}_{dtype}", function)


@functools.cache
def accumulate_callback(op: str, dtype: str) -> int:
    """Return the address of `accumulate(op, dtype)`: half-width elements folded into float32.

    op: also "mean", which adds each element over the divisor.
    """
    name = "sum" if op == "mean" else op
    check_operation(name, dtype, among=HALVES)
    element = ELEMENTS[dtype]
    function = _piecewise(
        OPS[dtype][name],
        (np.float32, identity, identity),
        (element.scalar, element.widen),
        divide if op == "mean" else keep,
    )
    return compile_callback(f"piece_accumulate_{op}_{dtype}", function)


@functools.cache
def widen_callback(dtype: str) -> int:
    """Return the address that writes half-width elements over the divisor into float32."""
    storage(dtype, HALVES)
    element = ELEMENTS[dtype]
    function = _piecewise(
        _second, (np.float32, identity, identity), (element.scalar, element.widen), divide
    )
    return compile_callback(f"piece_widen_{dtype}", function)


@functools.cache
def narrow_callback(dtype: str) -> int:
    """Return the address that writes float32 over the divisor into half-width elements."""
    storage(dtype, HALVES)
    element = ELEMENTS[dtype]
    function = _piecewise(
        _second, (element.scalar, identity, element.narrow), (np.float32, identity), divide
    )
    return compile_callback(f"piece_narrow_{dtype}", function)
