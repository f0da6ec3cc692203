"""Apply a function to every lane of tuples, or to several places, unrolled while it compiles.

A loop over a tuple would index it by a variable, which puts it into a thread's local memory.
"""

from __future__ import annotations

import functools
from typing import Any

from .primitives import DeviceElement, Function, primitives

BYTES_IN_FLIGHT = 64
"""What a thread asks of memory before it waits for any of it.

Memory is busy only while bandwidth x latency bytes are on their way (Little's law): about 25 KB for
each multiprocessor of an H200, of 4.8 TB/s (its data sheet) and 700 ns (assumed, not measured).
Kernels of 64 registers run 1024 threads there, so that 16 bytes of each would be too few.
"""


def num_steps(bytes_of_step: int) -> int:
    """Return how many steps of a loop, of so many bytes to be read, are done at once: 1, 2 or 4."""
    return 1 << (BYTES_IN_FLIGHT // min(bytes_of_step, BYTES_IN_FLIGHT)).bit_length() - 1


@functools.cache
def each(function: Function, count: int) -> Function:
    """Return (lanes, more) -> the tuple of function(lane, more) over `count` lanes."""
    compiled = primitives().compiled
    if count == 1:

        def one(a: Any, more: Any) -> Any:
            return (function(a[0], more),)

        return compiled(one)
    middle = count // 2
    part = each(function, middle)

    def many(a: Any, more: Any) -> Any:
        return part(a[:middle], more) + part(a[middle:], more)

    return compiled(many)


@functools.cache
def pairs(function: Function, count: int) -> Function:
    """Return (lanes, lanes) -> the tuple of function(lane, lane) over `count` lanes."""
    compiled = primitives().compiled
    if count == 1:

        def one(a: Any, b: Any) -> Any:
            return (function(a[0], b[0]),)

        return compiled(one)
    middle = count // 2
    part = pairs(function, middle)

    def many(a: Any, b: Any) -> Any:
        return part(a[:middle], b[:middle]) + part(a[middle:], b[middle:])

    return compiled(many)


@functools.cache
def total(function: Function, count: int) -> Function:
    """Return lanes -> function(function(0, 1), function(2, 3)) ..., a tree over `count` lanes."""
    compiled = primitives().compiled
    if count == 1:

        def one(a: Any) -> Any:
            return a[0]

        return compiled(one)
    middle = count // 2
    part = total(function, middle)

    def many(a: Any) -> Any:
        return function(part(a[:middle]), part(a[middle:]))

    return compiled(many)


@functools.cache
def places(function: Function, count: int) -> Function:
    """Return (first, stride, second, stride) -> the tuple of function(first, second), stepwise.

    `count` of them, one after the other, each a stride further.
    """
    compiled = primitives().compiled
    if count == 1:

        def one(first: Any, _step: Any, second: Any, _other: Any) -> Any:
            return (function(first, second),)

        return compiled(one)
    middle = count // 2
    part = places(function, middle)

    def many(first: Any, step: Any, second: Any, other: Any) -> Any:
        low = part(first, step, second, other)
        return low + part(first + middle * step, step, second + middle * other, other)

    return compiled(many)


@functools.cache
def deal(function: Function, count: int) -> Function:
    """Return (items, address, stride, more) -> the tuple of function(item, address, more)."""
    compiled = primitives().compiled
    if count == 1:

        def one(items: Any, address: Any, _step: Any, more: Any) -> Any:
            return (function(items[0], address, more),)

        return compiled(one)
    middle = count // 2
    part = deal(function, middle)

    def many(items: Any, address: Any, step: Any, more: Any) -> Any:
        low = part(items[:middle], address, step, more)
        return low + part(items[middle:], address + middle * step, step, more)

    return compiled(many)


@functools.cache
def reader(kind: DeviceElement, count: int) -> Function:
    """Return address -> a tuple of `count` elements as stored, in loads of 16 bytes."""
    p = primitives()
    load_lanes, scalar = p.load_lanes, kind.scalar
    if count == kind.lanes:

        def once(address: Any) -> Any:
            return load_lanes(address, scalar)

        return p.compiled(once)
    middle = count // 2
    part, skip = reader(kind, middle), middle * kind.size

    def twice(address: Any) -> Any:
        return part(address) + part(address + skip)

    return p.compiled(twice)


@functools.cache
def writer(kind: DeviceElement, count: int) -> Function:
    """Return (address, lanes) -> None that writes `count` elements in stores of 16 bytes."""
    p = primitives()
    store_lanes = p.store_lanes
    if count == kind.lanes:

        def once(address: Any, a: Any) -> None:
            store_lanes(address, a)

        return p.compiled(once)
    middle = count // 2
    part, skip = writer(kind, middle), middle * kind.size

    def twice(address: Any, a: Any) -> None:
        part(address, a[:middle])
        part(address + skip, a[middle:])

    return p.compiled(twice)
