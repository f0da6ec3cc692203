"""Choose how a reduction of one type and op is computed on a rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .dtypes import DType
from .executor import Arithmetic, Combine, Native
from .program import Program, with_accumulator

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Reduction:
    """One reduction, ready to run.

    program: what to run, over `work`.
    work: the flat array that the program reduces in place.
    begin: call before every run, finish: after it; they move the user's elements into work and
    the result back.
    """

    program: Program
    work: Array
    arithmetic: Arithmetic
    begin: Callable[[], None]
    finish: Callable[[], None]


def reduction(
    program: Program, flat: Array, dtype: DType, op: str, size: int, raw_reduce: bool
) -> Reduction:
    """Decide how `flat` is reduced over `size` ranks.

    A mean is the sum divided by the number of ranks. Half-width types are added in float32 and
    rounded once. Their mean is scaled by a power of two first, which is exact in float32, so that
    a sum beyond the largest number does not spoil a mean that can be represented.

    raw_reduce: the schedule adds raw contributions only (Proof.raw_reduce).
    """
    if not dtype.wide:
        return _same_width(program, flat, dtype, op, size)
    if raw_reduce:
        return _accumulated(program, flat, dtype, op, size)
    return _widened(program, flat, dtype, op, size)


def _nothing() -> None:
    return None


def _same_width(program: Program, flat: Array, dtype: DType, op: str, size: int) -> Reduction:
    def finish() -> None:
        if op == "mean" and size > 1:
            from ..kernels.reduce import divide

            divide(flat, float(size))

    arithmetic = _combined(plain(op), dtype.name)
    return Reduction(program, flat, arithmetic, _nothing, finish)


@cache
def _combined(op: str, dtype: str) -> Arithmetic:
    """Return what adds elements of one type to those of another buffer."""
    from ..kernels.reduce import combine

    return Arithmetic(_when_called(lambda: combine(op, dtype)), native=_combining(op, dtype))


def _when_called(make: Callable[[], Combine]) -> Combine:
    """Compile only once it is called: a compiled executor uses `native` instead."""
    made = cache(make)
    return lambda target, incoming: made()(target, incoming)


def _combining(op: str, dtype: str) -> Callable[[], Native]:
    @cache
    def native() -> Native:
        from ..kernels.pieces import combine_callback

        return Native(combine_callback(op, dtype))

    return native


def _accumulating(op: str, dtype: str, before: float, after: float) -> Callable[[], Native]:
    def native() -> Native:
        from ..kernels.pieces import accumulate_callback, narrow_callback, widen_callback

        add = accumulate_callback(op, dtype)
        return Native(add, widen_callback(dtype), narrow_callback(dtype), before, after)

    return native


def plain(op: str) -> str:
    """Return the op of which another is made by a division at the end."""
    return "sum" if op == "mean" else op


def mean_scales(op: str, size: int) -> tuple[float, float]:
    """Return (before, after): divide by the one before adding, by the other afterwards."""
    if op != "mean":
        return 1.0, 1.0
    before = float(1 << (size - 1).bit_length())
    return before, size / before


def divisors(op: str, dtype: DType, size: int) -> tuple[float, float]:
    """Return what a fold of all ranks' elements divides by, before it adds and afterwards."""
    if op != "mean":
        return 1.0, 1.0
    return mean_scales(op, size) if dtype.wide else (1.0, float(size))


def _widened(program: Program, flat: Array, dtype: DType, op: str, size: int) -> Reduction:
    """Send float32: partial sums travel, and rounding them on the way would add up."""
    from ..kernels.cast import narrow, widen
    from ..kernels.reduce import divide

    before, after = mean_scales(op, size)
    work = np.empty(flat.size, np.float32)

    def begin() -> None:
        widen(flat, work, dtype.name)
        if before != 1.0:
            divide(work, before)

    def finish() -> None:
        narrow(work, flat, dtype.name, after)

    arithmetic = _combined(plain(op), "float32")
    return Reduction(program, work, arithmetic, begin, finish)


def _accumulated(program: Program, flat: Array, dtype: DType, op: str, size: int) -> Reduction:
    """Send the type's own width: every message is a raw contribution, or a finished result."""
    from ..kernels.cast import narrow, widen
    from ..kernels.reduce import accumulate, combine, divide

    before, after = mean_scales(op, size)
    add = _when_called(lambda: accumulate(plain(op), dtype.name))
    # Not NumPy's own, which warns or raises by its error state, on one rank alone.
    add_wide = _when_called(lambda: combine("sum", "float32"))

    def widen_own(wide: Array, piece: Array) -> None:
        widen(piece, wide, dtype.name)
        if before != 1.0:
            divide(wide, before)

    def add_scaled(wide: Array, incoming: Array) -> None:
        if before == 1.0:
            add(wide, incoming)
            return
        scaled = np.empty(incoming.size, np.float32)
        widen_own(scaled, incoming)
        add_wide(wide, scaled)

    def narrow_back(piece: Array, wide: Array) -> None:
        narrow(wide, piece, dtype.name, after)

    native = _accumulating(op, dtype.name, before, after)
    wide = np.empty(flat.size, np.float32)
    arithmetic = Arithmetic(add_scaled, wide, widen_own, narrow_back, native)
    return Reduction(with_accumulator(program), flat, arithmetic, _nothing, _nothing)
