"""Find the magnitude of the k-th largest element without sorting: the threshold of a top-k.

Radix selection on the bits of the magnitudes, whose order as integers is that of the values: three
launches count the digits of 11, 10 and 10 bits among the elements that still match, and the last
block of each picks the digit. Alabi et al., "Fast k-Selection Algorithms for Graphics Processing
Units", JEA 2012, section 3.3. The host waits for none of them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, types

from ..storage import HALVES, storage
from .lanes import each, num_steps, places, reader
from .launch import Launcher, compile_kernel
from .primitives import element, primitives, simulating
from .table import Placed, Span, place

BINS = 2048
PASSES = ((20, 11), (10, 10), (0, 10))
"""Shift and width of each digit of 31 bits, from the highest."""

_STATE = 4
_MAGNITUDE = 0x7FFFFFFF


class Threshold(NamedTuple):
    """The k-th largest magnitude, and how many elements have a larger one.

    All of those and `k - above` of the elements of exactly this magnitude are the top k. NaN counts
    as larger than infinity.
    """

    value: float
    above: int


@dataclass(frozen=True)
class Selection:
    """Device memory of a selection, of one stream at a time.

    int64 words: the bits found so far, how many are still wanted, elements above, a ticket; then
    the bins, which are zero between launches.
    """

    memory: Placed

    @classmethod
    def of(cls, launcher: Launcher) -> Selection:
        """Make it."""
        return cls(place(np.zeros(_STATE + BINS, np.int64), launcher))

    def begin(self, wanted: int, launcher: Launcher) -> None:
        """Put on the stream the state before the first digit."""
        state = np.array([0, wanted, 0, 0], np.int64)
        if simulating():
            self.memory.owner[:_STATE] = state
            return
        with cuda.gpus[launcher.device]:
            self.memory.owner[:_STATE].copy_to_device(state, stream=launcher.external)

    def read(self, launcher: Launcher) -> Threshold:
        """Return what was found, after waiting for the launcher's stream."""
        if simulating():
            state = np.array(self.memory.owner[:_STATE])
        else:
            with cuda.gpus[launcher.device]:
                stream = launcher.external
                state = self.memory.owner[:_STATE].copy_to_host(stream=stream)
                stream.synchronize()
        value = np.array([state[0]], np.uint32).view(np.float32)[0]
        return Threshold(float(value), int(state[2]))


@functools.cache
def digit_kernel(dtype: str, shift: int, width: int, threads: int) -> Any:
    """Return the kernel (address, count, state) that finds one digit."""
    p = primitives()
    load, load_fresh, store = p.load, p.load_fresh, p.store
    atomic_add, float32_bits = p.atomic_add, p.float32_bits
    kind = element(dtype)
    scalar, size, widen, vector = kind.scalar, kind.size, kind.widen, kind.lanes
    bins, above_shift = 1 << width, shift + width
    per_thread = -(-bins // threads)
    first_bin = 8 * _STATE
    steps, wide = num_steps(vector * size), vector * size
    read, compiled = reader(kind, vector), p.compiled

    def count_one(raw: Any, more: Any) -> Any:
        mine, found = more
        bits = np.int64(float32_bits(widen(raw))) & _MAGNITUDE
        if bits >> above_shift == found >> above_shift:
            cuda.atomic.add(mine, (bits >> shift) & (bins - 1), 1)
        return 0

    def read_one(at: Any, _second: Any) -> Any:
        return read(at)

    count_one = compiled(count_one)
    count_vector = each(count_one, vector)
    fetch, count_all = places(compiled(read_one), steps), each(count_vector, steps)

    def digit(address: Any, count: Any, state: Any) -> None:
        mine = cuda.shared.array(bins, types.int64)
        sums = cuda.shared.array(threads, types.int64)
        ticket = cuda.shared.array(1, types.int64)
        me = cuda.threadIdx.x
        i = np.int64(me)
        while i < bins:
            mine[i] = 0
            i += threads
        cuda.syncthreads()

        found = load(state, np.int64)
        more = (mine, found)
        skip = min(np.int64(((16 - (address & 15)) & 15) // size), count)
        vectors, start = (count - skip) // vector, address + skip * size
        block, blocks = np.int64(cuda.blockIdx.x), np.int64(cuda.gridDim.x)
        i = block * steps * threads + me
        while i + (steps - 1) * threads < vectors:
            count_all(fetch(start + i * wide, threads * wide, 0, 0), more)
            i += blocks * steps * threads
        while i < vectors:
            count_vector(read(start + i * wide), more)
            i += threads
        i = block * threads + me
        while i < count - vectors * vector:
            at = i if i < skip else i + vectors * vector
            count_one(load(address + at * size, scalar), more)
            i += blocks * threads
        cuda.syncthreads()

        i = np.int64(me)
        while i < bins:
            if mine[i] > 0:
                atomic_add(state + first_bin + i * 8, np.int64(mine[i]))
            i += threads
        # Every thread's additions come before the ticket that thread 0 takes for the block.
        cuda.threadfence()
        cuda.syncthreads()
        if me == 0:
            ticket[0] = atomic_add(state + 24, np.int64(1))
        cuda.syncthreads()
        if ticket[0] == cuda.gridDim.x - 1:
            cuda.threadfence()
            part = np.int64(0)
            for k in range(per_thread):
                bin_at = np.int64(me) * per_thread + k
                if bin_at < bins:
                    there = state + first_bin + bin_at * 8
                    mine[bin_at] = load_fresh(there, np.int64)
                    store(there, np.int64(0))
                    part += mine[bin_at]
            sums[me] = part
            cuda.syncthreads()
            if me == 0:
                wanted = load(state + 8, np.int64)
                above = np.int64(0)
                group = np.int64(threads - 1)
                while group > 0 and above + sums[group] < wanted:
                    above += sums[group]
                    group -= 1
                place_of = (group + 1) * per_thread - 1
                if place_of > bins - 1:
                    place_of = np.int64(bins - 1)
                while place_of > 0 and above + mine[place_of] < wanted:
                    above += mine[place_of]
                    place_of -= 1
                store(state, np.int64(found | (place_of << shift)))
                store(state + 8, np.int64(wanted - above))
                store(state + 16, np.int64(load(state + 16, np.int64) + above))
                store(state + 24, np.int64(0))

    return compile_kernel(f"digit_{dtype}_{shift}_{threads}", digit)


def threshold(
    source: Span, dtype: str, wanted: int, selection: Selection, launcher: Launcher
) -> bool:
    """Find the magnitude of the `wanted`-th largest element of float32 or half-width storage.

    Ordered on the launcher's stream; returns at once, and whether there was anything to launch: a
    source of no elements has no threshold.

    Raises: ValueError where `wanted` is not between 1 and the number of elements.
    """
    storage(dtype, ("float32", *HALVES))
    source.check(dtype, "source")
    if source.count == 0 and wanted == 0:
        return False
    if not 1 <= wanted <= source.count:
        raise ValueError(f"expected to want 1 to {source.count} elements, got {wanted}")
    selection.begin(wanted, launcher)
    vector, size = element(dtype).lanes, element(dtype).size
    grid = -(-source.count // (vector * num_steps(vector * size) * launcher.threads))
    for shift, width in PASSES:
        launcher.launch(
            digit_kernel(dtype, shift, width, launcher.threads),
            grid,
            np.int64(source.address),
            np.int64(source.count),
            np.int64(selection.memory.span.address),
        )
    return True
