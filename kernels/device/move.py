"""Move elements from one place to another in a kernel, and learn of them on the way.

Threads take vectors, so that neighbours touch neighbouring 16 bytes. Where both sides cannot be
aligned at once, and at the ends, single elements are moved.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import numpy as np

from .lanes import deal, each, num_steps, pairs, places, reader, total, writer
from .primitives import DeviceElement, Function, primitives

_CHANGES = {"multiply": operator.mul, "divide": operator.truediv}


@functools.cache
def head_of(first_size: int, second_size: int, vector: int) -> Function:
    """Return (address, address) -> elements before both are aligned to 16 bytes; -1 if never."""

    def head(first: Any, second: Any) -> Any:
        for skip in range(vector):
            if ((first + skip * first_size) | (second + skip * second_size)) & 15 == 0:
                return skip
        return -1

    return primitives().compiled(head)


def moved_at_once(source_kind: DeviceElement, target_kind: DeviceElement, change: str) -> int:
    """Return the elements that a thread moves before it waits for others."""
    vector = max(source_kind.lanes, target_kind.lanes)
    read = source_kind.size + (target_kind.size if change == "add" else 0)
    return vector * num_steps(vector * read)


@functools.cache
def mover(
    source_kind: DeviceElement, target_kind: DeviceElement, real: Any, change: str
) -> Function:
    """Return the device function that moves a thread's elements from one span to another.

    Given the thread's place among those of its block, how many these are, and the same for the
    block among those that share the spans.  change: "multiply" or "divide" by a factor, or "add"
    to what is there.
    """
    p = primitives()
    load, store, compiled = p.load, p.store, p.compiled
    size_in, size_out = source_kind.size, target_kind.size
    vector = max(source_kind.lanes, target_kind.lanes)
    widen, narrow, is_finite = source_kind.widen, target_kind.narrow, target_kind.is_finite
    scalar_in, scalar_out = source_kind.scalar, target_kind.scalar
    widen_target = target_kind.widen
    operation = _CHANGES.get(change)

    def change_one(value: Any, factor: Any) -> Any:
        return operation(real(widen(value)), factor)  # type: ignore[misc]

    def add_one(value: Any, present: Any) -> Any:
        return real(widen(value)) + real(widen_target(present))

    def narrow_one(value: Any, _more: Any) -> Any:
        return narrow(value)

    def square_one(value: Any, _more: Any) -> Any:
        return np.float64(value) * np.float64(value)

    def broken_one(stored: Any, _more: Any) -> Any:
        return 0 if is_finite(stored) else 1

    change_one, add_one, narrow_one = compiled(change_one), compiled(add_one), compiled(narrow_one)
    square_one, broken_one = compiled(square_one), compiled(broken_one)
    read, write = reader(source_kind, vector), writer(target_kind, vector)
    narrowed = each(narrow_one, vector)
    squares, breaks = each(square_one, vector), each(broken_one, vector)
    add_all, any_of = total(operator.add, vector), total(operator.or_, vector)
    head_between = head_of(size_in, size_out, vector)

    if change == "add":
        present, summed = reader(target_kind, vector), pairs(add_one, vector)

        def fetch_one(source: Any, target: Any) -> Any:
            return read(source), present(target)

        def values_of(fetched: Any, factor: Any) -> Any:
            return summed(fetched[0], fetched[1])

        def value_of(raw: Any, target: Any, factor: Any) -> Any:
            return add_one(raw, load(target, scalar_out))

    else:
        changed = each(change_one, vector)

        def fetch_one(source: Any, target: Any) -> Any:
            return read(source)

        def values_of(fetched: Any, factor: Any) -> Any:
            return changed(fetched, factor)

        def value_of(raw: Any, target: Any, factor: Any) -> Any:
            return change_one(raw, factor)

    fetch_one, values_of = compiled(fetch_one), compiled(values_of)
    value_of = compiled(value_of)

    def finish_one(fetched: Any, target: Any, factor: Any) -> Any:
        values = values_of(fetched, factor)
        stored = narrowed(values, 0)
        write(target, stored)
        return add_all(squares(values, 0)), any_of(breaks(stored, 0))

    def both(first: Any, second: Any) -> Any:
        return first[0] + second[0], first[1] | second[1]

    finish_one, both = compiled(finish_one), compiled(both)
    wide_in, wide_out = vector * size_in, vector * size_out
    steps = moved_at_once(source_kind, target_kind, change) // vector
    fetch, finish, learned = places(fetch_one, steps), deal(finish_one, steps), total(both, steps)

    def move(
        source: Any,
        target: Any,
        count: Any,
        thread: Any,
        threads: Any,
        block: Any,
        blocks: Any,
        factor: Any,
    ) -> Any:
        square, broken = 0.0, 0
        head = head_between(source, target)
        vectors = (count - head) // vector if 0 <= head < count else 0
        skip = head if vectors > 0 else 0
        source_at, target_at = source + skip * size_in, target + skip * size_out
        i = block * steps * threads + thread
        while i + (steps - 1) * threads < vectors:
            there, step = target_at + i * wide_out, threads * wide_out
            # All loads before the first store: memory answers them together.
            fetched = fetch(source_at + i * wide_in, threads * wide_in, there, step)
            more, wrong = learned(finish(fetched, there, step, factor))
            square += more
            broken |= wrong
            i += blocks * steps * threads
        while i < vectors:
            there = target_at + i * wide_out
            more, wrong = finish_one(fetch_one(source_at + i * wide_in, there), there, factor)
            square += more
            broken |= wrong
            i += threads
        i = block * threads + thread
        while i < count - vectors * vector:
            at = i if i < skip else i + vectors * vector
            value = value_of(load(source + at * size_in, scalar_in), target + at * size_out, factor)
            result = narrow_one(value, 0)
            store(target + at * size_out, result)
            square += square_one(value, 0)
            broken |= broken_one(result, 0)
            i += blocks * threads
        return square, broken

    return compiled(move)
