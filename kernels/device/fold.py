"""Fold several ranks' copies of a buffer in one pass, elementwise.

Every element is folded in the order of the sources, read once from each and written once to each
target, so equal inputs give equal bits on whichever device folds. A target may be a source.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import cuda

from ..operations import check_operation
from ..storage import FLOATS, HALVES, STORAGE, change_by, check_divisor
from .combine import operation_of
from .lanes import deal, each, num_steps, pairs, places, reader, writer
from .launch import Launcher, compile_kernel
from .primitives import element, primitives
from .table import Placed, Span, place


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
    operation = operation_of("sum" if mean else op, dtype)

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
        thread, block = np.int64(cuda.threadIdx.x), np.int64(cuda.blockIdx.x)
        blocks = np.int64(cuda.gridDim.x)
        i = block * steps * threads + thread
        while i + (steps - 1) * threads < vectors:
            at, step = before * size + i * wide, threads * wide
            values = prepare_all(fetch(lead + at, step, 0, 0), 0, 0, first)
            for r in range(1, num_sources):
                incoming = fetch(load(sources + r * 8, np.int64) + skip + at, step, 0, 0)
                values = combine_all(values, prepare_all(incoming, 0, 0, first))
            results = finish_all(values, 0, 0, last)
            for r in range(num_targets):
                write_all(results, load(targets + r * 8, np.int64) + into + at, step, 0)
            i += blocks * steps * threads
        while i < vectors:
            at = before * size + i * wide
            values = prepared(read(lead + at), first)
            for r in range(1, num_sources):
                incoming = read(load(sources + r * 8, np.int64) + skip + at)
                values = combined(values, prepared(incoming, first))
            results = finished(values, last)
            for r in range(num_targets):
                write(load(targets + r * 8, np.int64) + into + at, results)
            i += threads
        i = block * threads + thread
        while i < count - vectors * vector:
            at = (i if i < before else i + vectors * vector) * size
            value = prepare(load(lead + at, scalar), first)
            for r in range(1, num_sources):
                other = load(load(sources + r * 8, np.int64) + skip + at, scalar)
                value = operation(value, prepare(other, first))
            result = finish(value, last)
            for r in range(num_targets):
                store(load(targets + r * 8, np.int64) + into + at, result)
            i += blocks * threads

    return compile_kernel(f"fold_{op}_{dtype}", fold, blocks=3)


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


def _wide(dtype: str, value: float) -> Any:
    return element(dtype).wide(value) if dtype in (*FLOATS, *HALVES) else np.float32(value)


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
    vector, size = element(dtype).lanes, element(dtype).size
    return launcher.prepared(
        fold_kernel(op, dtype, "multiply" if exact else "divide"),
        -(-count // (vector * num_steps(vector * size) * launcher.threads)),
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
        keeps=(sources, targets),
    )
