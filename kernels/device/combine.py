"""Fold one buffer into another, elementwise, and the operations that do so."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numba import cuda

from ..operations import check_operation
from ..storage import FLOATS, HALVES
from .lanes import deal, num_steps, pairs, places, reader, writer
from .launch import Launcher, compile_kernel
from .move import head_of
from .primitives import DeviceElement, Function, element, primitives
from .table import Span


def _float_minimum(first: Any, second: Any) -> Any:
    smaller = first < second or first != first
    tie_first = first == second and math.copysign(1.0, first) < 0.0
    return first if smaller or tie_first else second


def _float_maximum(first: Any, second: Any) -> Any:
    larger = first > second or first != first
    tie_first = first == second and math.copysign(1.0, second) < 0.0
    return first if larger or tie_first else second


def _integer_minimum(first: Any, second: Any) -> Any:
    return first if first < second else second


def _integer_maximum(first: Any, second: Any) -> Any:
    return first if first > second else second


_SUMS = {"sum": operator.add, "prod": operator.mul}
_FLOAT_OPS: Mapping[str, Callable[[Any, Any], Any]] = MappingProxyType(
    {**_SUMS, "min": _float_minimum, "max": _float_maximum}
)
_INTEGER_OPS: Mapping[str, Callable[[Any, Any], Any]] = MappingProxyType(
    {**_SUMS, "min": _integer_minimum, "max": _integer_maximum}
)


@functools.cache
def operation_of(op: str, dtype: str) -> Function:
    """Return the device function (wide, wide) -> wide of one operation."""
    table = _FLOAT_OPS if dtype in (*FLOATS, *HALVES) else _INTEGER_OPS
    function, wide = table[op], element(dtype).wide
    if op not in _SUMS:
        function = primitives().compiled(function)

    def apply(first: Any, second: Any) -> Any:
        # Numba computes with integers of 64 bits; as wide they wrap.
        return wide(function(first, second))

    return primitives().compiled(apply)


def combined_at_once(into: DeviceElement, incoming: DeviceElement) -> int:
    """Return the elements that a thread combines before it waits for others."""
    vector = max(into.lanes, incoming.lanes)
    return vector * num_steps(vector * (into.size + incoming.size))


@functools.cache
def combine_kernel(op: str, into_dtype: str, incoming_dtype: str) -> Any:
    """Return the kernel (target, incoming, count, threads): fold one buffer into another."""
    p = primitives()
    load, store, compiled = p.load, p.store, p.compiled
    into, incoming = element(into_dtype), element(incoming_dtype)
    vector = max(into.lanes, incoming.lanes)
    scalar, scalar_in = into.scalar, incoming.scalar
    size, size_in = into.size, incoming.size
    widen, widen_in, narrow = into.widen, incoming.widen, into.narrow
    operation = operation_of(op, into_dtype)

    def one(present: Any, other: Any) -> Any:
        return narrow(operation(widen(present), widen_in(other)))

    one = compiled(one)
    both, read, read_in = pairs(one, vector), reader(into, vector), reader(incoming, vector)
    write, head_between = writer(into, vector), head_of(size, size_in, vector)
    wide, wide_in = vector * size, vector * size_in
    steps = combined_at_once(into, incoming) // vector

    def fetch_one(target: Any, other: Any) -> Any:
        return read(target), read_in(other)

    def finish_one(fetched: Any, target: Any, _more: Any) -> Any:
        write(target, both(fetched[0], fetched[1]))
        return 0

    fetch_one, finish_one = compiled(fetch_one), compiled(finish_one)
    fetch, finish = places(fetch_one, steps), deal(finish_one, steps)

    def combine(target: Any, other: Any, count: Any, threads: Any) -> None:
        head = head_between(target, other)
        vectors = (count - head) // vector if 0 <= head < count else 0
        skip = head if vectors > 0 else 0
        thread, block = np.int64(cuda.threadIdx.x), np.int64(cuda.blockIdx.x)
        blocks = np.int64(cuda.gridDim.x)
        target_at, other_at = target + skip * size, other + skip * size_in
        i = block * steps * threads + thread
        while i + (steps - 1) * threads < vectors:
            there, step = target_at + i * wide, threads * wide
            fetched = fetch(there, step, other_at + i * wide_in, threads * wide_in)
            finish(fetched, there, step, 0)
            i += blocks * steps * threads
        while i < vectors:
            there = target_at + i * wide
            finish_one(fetch_one(there, other_at + i * wide_in), there, 0)
            i += threads
        i = block * threads + thread
        while i < count - vectors * vector:
            at = i if i < skip else i + vectors * vector
            there = target + at * size
            store(there, one(load(there, scalar), load(other + at * size_in, scalar_in)))
            i += blocks * threads

    return compile_kernel(f"combine_{op}_{into_dtype}_{incoming_dtype}", combine)


def combine(op: str, dtype: str, target: Span, incoming: Span, launcher: Launcher) -> bool:
    """Set target to `target op incoming`: `reduce.combine`, on the launcher's stream.

    Returns at once, and whether there was anything to launch. TypeError if not in ALLOWED.
    """
    return _combine(op, dtype, dtype, target, incoming, launcher)


def accumulate(op: str, dtype: str, target: Span, incoming: Span, launcher: Launcher) -> bool:
    """Fold half-width storage of `dtype` into float32: `reduce.accumulate`. As `combine`."""
    check_operation(op, dtype, among=HALVES)
    return _combine(op, "float32", dtype, target, incoming, launcher)


def _combine(
    op: str, into: str, dtype: str, target: Span, incoming: Span, launcher: Launcher
) -> bool:
    check_operation(op, dtype)
    target.check(into, "target")
    incoming.check(dtype, "incoming")
    if target.count != incoming.count:
        raise ValueError(
            f"target has {target.count} elements and incoming has {incoming.count}; "
            "expected equal sizes"
        )
    at_once = combined_at_once(element(into), element(dtype))
    return launcher.launch(
        combine_kernel(op, into, dtype),
        -(-target.count // (at_once * launcher.threads)),
        np.int64(target.address),
        np.int64(incoming.address),
        np.int64(target.count),
        np.int64(launcher.threads),
    )
