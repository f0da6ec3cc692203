"""Fold buffers elementwise: one into another, or several ranks' copies in one pass.

Every element is folded in the order of the sources, read once from each and written once to each
target, so equal inputs give equal bits on whichever device folds. A target may be a source.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numba import cuda

from ..operations import check_operation
from ..storage import FLOATS, HALVES, STORAGE, change_by, check_divisor
from .lanes import deal, each, num_steps, pairs, places, reader, writer
from .launch import Launcher, compile_kernel
from .pack import head_of
from .primitives import Function, element, primitives
from .table import Placed, Span, place


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
def _operation(op: str, dtype: str) -> Function:
    """Return the device function (wide, wide) -> wide of one operation."""
    table = _FLOAT_OPS if dtype in (*FLOATS, *HALVES) else _INTEGER_OPS
    function, wide = table[op], element(dtype).wide
    if op not in _SUMS:
        function = primitives().compiled(function)

    def apply(first: Any, second: Any) -> Any:
        # Numba computes with integers of 64 bits; as wide they wrap.
        return wide(function(first, second))

    return primitives().compiled(apply)


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
    operation = _operation(op, into_dtype)

    def one(present: Any, other: Any) -> Any:
        return narrow(operation(widen(present), widen_in(other)))

    one = compiled(one)
    both, read, read_in = pairs(one, vector), reader(into, vector), reader(incoming, vector)
    write, head_between = writer(into, vector), head_of(size, size_in, vector)
    wide, wide_in = vector * size, vector * size_in
    steps = num_steps(wide + wide_in)

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
        start = np.int64(cuda.blockIdx.x) * threads + cuda.threadIdx.x
        stride = np.int64(cuda.gridDim.x) * threads
        target_at, other_at = target + skip * size, other + skip * size_in
        i = start
        while i + (steps - 1) * stride < vectors:
            there, step = target_at + i * wide, stride * wide
            fetched = fetch(there, step, other_at + i * wide_in, stride * wide_in)
            finish(fetched, there, step, 0)
            i += steps * stride
        while i < vectors:
            there = target_at + i * wide
            finish_one(fetch_one(there, other_at + i * wide_in), there, 0)
            i += stride
        i = start
        while i < count - vectors * vector:
            at = i if i < skip else i + vectors * vector
            there = target + at * size
            store(there, one(load(there, scalar), load(other + at * size_in, scalar_in)))
            i += stride

    return compile_kernel(f"combine_{op}_{into_dtype}_{incoming_dtype}", combine)


@functools.cache
def fold_kernel(op: str, dtype: str, change: str = "multiply") -> Any:
    """Return the kernel that folds `Peers`: see `fold` for its arguments, in that order.

    change: how op "mean" applies `first` and `last`, "multiply" or "divide".
    """
    p = primitives()
    load, store, compiled = p.load, p.store, p.compiled
    kind = element(dtype)
    vector, size, scalar = kind.lanes, kind.size, kind.scalar
    widen, narrow = kind.widen, kind.narrow
    mean = op == "mean"
    operation = _operation("sum" if mean else op, dtype)

    changed = {"multiply": operator.mul, "divide": operator.truediv}[change]
    change_half = p.float32_product if change == "multiply" else operator.truediv

    def prepare_mean_of_halves(stored: Any, first: Any) -> Any:
        return change_half(widen(stored), first)

    def prepare_plain(stored: Any, _first: Any) -> Any:
        return widen(stored)

    def finish_mean(value: Any, last: Any) -> Any:
        return narrow(changed(value, last))

    def finish_plain(value: Any, _last: Any) -> Any:
        return narrow(value)

    prepare = compiled(prepare_mean_of_halves if mean and dtype in HALVES else prepare_plain)
    finish = compiled(finish_mean if mean else finish_plain)
    prepared, finished = each(prepare, vector), each(finish, vector)
    combined, read, write = pairs(operation, vector), reader(kind, vector), writer(kind, vector)

    def read_one(address: Any, _second: Any) -> Any:
        return read(address)

    def prepare_one(stored: Any, _address: Any, first: Any) -> Any:
        return prepared(stored, first)

    def finish_one(values: Any, _address: Any, last: Any) -> Any:
        return finished(values, last)

    def write_one(results: Any, address: Any, _more: Any) -> Any:
        write(address, results)
        return 0

    wide = vector * size
    steps = num_steps(wide)
    fetch = places(compiled(read_one), steps)
    prepare_all, finish_all = deal(compiled(prepare_one), steps), deal(compiled(finish_one), steps)
    combine_all, write_all = pairs(combined, steps), deal(compiled(write_one), steps)

    def common_head(table: Any, count: Any, skip: Any, head: Any) -> Any:
        for i in range(count):
            address = load(table + i * 8, np.int64) + skip
            if head < 0 or (address + head * size) & 15 != 0:
                return -1
        return head

    common_head = compiled(common_head)

    def fold(
        sources: Any,
        num_sources: Any,
        skip: Any,
        targets: Any,
        num_targets: Any,
        into: Any,
        count: Any,
        first: Any,
        last: Any,
        threads: Any,
    ) -> None:
        lead = load(sources, np.int64) + skip
        head = ((16 - (lead & 15)) & 15) // size
        head = common_head(sources, num_sources, skip, head)
        head = common_head(targets, num_targets, into, head)
        vectors = (count - head) // vector if 0 <= head < count else 0
        before = head if vectors > 0 else 0
        start = np.int64(cuda.blockIdx.x) * threads + cuda.threadIdx.x
        stride = np.int64(cuda.gridDim.x) * threads
        i = start
        while i + (steps - 1) * stride < vectors:
            at, step = before * size + i * wide, stride * wide
            values = prepare_all(fetch(lead + at, step, 0, 0), 0, 0, first)
            for r in range(1, num_sources):
                incoming = fetch(load(sources + r * 8, np.int64) + skip + at, step, 0, 0)
                values = combine_all(values, prepare_all(incoming, 0, 0, first))
            results = finish_all(values, 0, 0, last)
            for r in range(num_targets):
                write_all(results, load(targets + r * 8, np.int64) + into + at, step, 0)
            i += steps * stride
        while i < vectors:
            at = before * size + i * wide
            values = prepared(read(lead + at), first)
            for r in range(1, num_sources):
                incoming = read(load(sources + r * 8, np.int64) + skip + at)
                values = combined(values, prepared(incoming, first))
            results = finished(values, last)
            for r in range(num_targets):
                write(load(targets + r * 8, np.int64) + into + at, results)
            i += stride
        i = start
        while i < count - vectors * vector:
            at = (i if i < before else i + vectors * vector) * size
            value = prepare(load(lead + at, scalar), first)
            for r in range(1, num_sources):
                other = load(load(sources + r * 8, np.int64) + skip + at, scalar)
                value = operation(value, prepare(other, first))
            result = finish(value, last)
            for r in range(num_targets):
                store(load(targets + r * 8, np.int64) + into + at, result)
            i += stride

    return compile_kernel(f"fold_{op}_{dtype}", fold)


@dataclass(frozen=True)
class Peers:
    """Addresses of the same buffer on several ranks, as a table in device memory; made once."""

    table: Placed
    addresses: tuple[int, ...]

    @classmethod
    def of(cls, addresses: tuple[int, ...], launcher: Launcher) -> Peers:
        """Place a table of at least one address, none of them null, in rank order."""
        if not addresses or not all(addresses):
            raise ValueError(f"expected one address or more, none null, got {addresses}")
        return cls(place(np.array(addresses, np.int64), launcher), addresses)


def _grid(count: int, vector: int, launcher: Launcher) -> int:
    return -(-count // (vector * launcher.threads))


def _wide(dtype: str, value: float) -> Any:
    return element(dtype).wide(value) if dtype in (*FLOATS, *HALVES) else np.float32(value)


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
    vector = max(element(into).lanes, element(dtype).lanes)
    return launcher.launch(
        combine_kernel(op, into, dtype),
        _grid(target.count, vector, launcher),
        np.int64(target.address),
        np.int64(incoming.address),
        np.int64(target.count),
        np.int64(launcher.threads),
    )


def fold(
    op: str,
    dtype: str,
    sources: Peers,
    targets: Peers,
    count: int,
    launcher: Launcher,
    *,
    skip: int = 0,
    into: int = 0,
    first: float = 1.0,
    last: float = 1.0,
) -> bool:
    """Fold `count` elements of all sources in their order, and write the result to all targets.

    skip, into: bytes from each source's, and each target's address to the piece. op "mean", of
    floats, is a sum that divides each result by `last`, and for half widths each element by `first`
    before. A target may be a source at the same place; otherwise they must not overlap.

    Returns at once, and whether there was anything to launch. Raises: TypeError where the op is not
    allowed for the dtype.
    """
    prepared = prepare_fold(
        op, dtype, sources, targets, count, launcher, skip=skip, into=into, first=first, last=last
    )
    return prepared()


def prepare_fold(
    op: str,
    dtype: str,
    sources: Peers,
    targets: Peers,
    count: int,
    launcher: Launcher,
    *,
    skip: int = 0,
    into: int = 0,
    first: float = 1.0,
    last: float = 1.0,
) -> Callable[[], bool]:
    """Return what does as `fold`, each time that it is called."""
    mean = op == "mean"
    check_operation(
        "sum" if mean else op, dtype, among=(*HALVES, *FLOATS) if mean else tuple(STORAGE)
    )
    for divisor in (first, last):
        check_divisor(divisor)
    changes = [change_by(divisor) for divisor in (first, last)]
    exact = all(change == "multiply" for change, _ in changes)
    before, after = (changes[0][1], changes[1][1]) if exact else (first, last)
    for what, peers, offset in (("source", sources, skip), ("target", targets, into)):
        for index, address in enumerate(peers.addresses):
            Span(address + offset, count).check(dtype, f"{what} {index}")
    return launcher.prepared(
        fold_kernel(op, dtype, "multiply" if exact else "divide"),
        _grid(count, element(dtype).lanes, launcher),
        np.int64(sources.table.span.address),
        np.int64(len(sources.addresses)),
        np.int64(skip),
        np.int64(targets.table.span.address),
        np.int64(len(targets.addresses)),
        np.int64(into),
        np.int64(count),
        _wide(dtype, before),
        _wide(dtype, after),
        np.int64(launcher.threads),
    )
