"""Make masks of dropout where they are used: the host's random words, in one launch.

Philox 4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3), in
the order in which NumPy draws: the counter is increased before a block of four words is made of it.
A thread makes a block, which is eight elements of a mask.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from .launch import Launcher, compile_kernel
from .primitives import Function, primitives
from .table import Span

ELEMENTS = 8
"""Of a block: two halves of each of its words, the lower one first."""

_ROUNDS = 10
_FIRST, _SECOND = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_GROW_FIRST, _GROW_SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)
_HALF, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)


@functools.cache
def _block() -> Function:
    """Return the device function (first key, second key, number, sample) -> four words."""
    high, compiled = primitives().word_product_high, primitives().compiled

    def block(key: Any, other: Any, number: Any, sample: Any) -> Any:
        a, b, c, d = number, np.uint64(0), sample, np.uint64(0)
        for _ in range(_ROUNDS):
            a, b, c, d = (
                high(_SECOND, c) ^ b ^ key,
                _SECOND * c,
                high(_FIRST, a) ^ d ^ other,
                _FIRST * a,
            )
            key, other = key + _GROW_FIRST, other + _GROW_SECOND
        return a, b, c, d

    return compiled(block)


@functools.cache
def mask_kernel() -> Any:
    """Return the kernel that writes a mask: see `mask` for its arguments, in that order."""
    p = primitives()
    store, compiled, block = p.store, p.compiled, _block()

    def flags(word: Any, least: Any) -> Any:
        """Two elements, in the lowest bytes."""
        low = np.uint64(1) if word & _LOW >= least else np.uint64(0)
        high = np.uint64(256) if word >> _HALF >= least else np.uint64(0)
        return low | high

    flags = compiled(flags)

    def mask(
        target: Any,
        rows: Any,
        count: Any,
        sample: Any,
        key: Any,
        other: Any,
        least: Any,
        threads: Any,
    ) -> None:
        blocks = (count + ELEMENTS - 1) // ELEMENTS
        i = np.int64(cuda.blockIdx.x) * threads + cuda.threadIdx.x
        while i < rows * blocks:
            row, number = i // blocks, i % blocks
            a, b, c, d = block(key, other, np.uint64(number + 1), np.uint64(sample + row))
            eight = (
                flags(a, least)
                | flags(b, least) << np.uint64(16)
                | flags(c, least) << np.uint64(32)
                | flags(d, least) << np.uint64(48)
            )
            there = target + row * count + number * ELEMENTS
            left = count - number * ELEMENTS
            if left >= ELEMENTS and there & 7 == 0:
                store(there, eight)
            else:
                for k in range(min(left, ELEMENTS)):
                    store(there + k, np.uint8(eight >> np.uint64(8 * k)))
            i += np.int64(cuda.gridDim.x) * threads

    return compile_kernel("mask", mask)


def mask(
    target: Span,
    rows: int,
    sample: int,
    key: tuple[int, int],
    least: int,
    launcher: Launcher,
) -> bool:
    """Write 1 for every element whose random word is `least` or more, else 0: `kernels.masks.mask`.

    target: bytes, `rows` rows of equal length; row r is of sample + r.  key: two words of 64 bits.
    least: up to 2**32, which keeps nothing. Returns at once, and whether there was anything to
    launch.

    Raises: ValueError where the rows do not share the bytes out.
    """
    target.check("uint8", "mask")
    if rows < 0 or (target.count % rows if rows else target.count):
        raise ValueError(f"mask: {target.count} bytes for {rows} rows of equal length")
    if not 0 <= least <= 1 << 32:
        raise ValueError(f"expected a least word between 0 and 2**32, got {least}")
    count = target.count // rows if rows else 0
    wanted = -(-rows * -(-count // ELEMENTS) // launcher.threads)
    return launcher.launch(
        mask_kernel(),
        wanted,
        np.int64(target.address),
        np.int64(rows),
        np.int64(count),
        np.int64(sample),
        np.uint64(key[0]),
        np.uint64(key[1]),
        np.uint64(least),
        np.int64(launcher.threads),
    )
