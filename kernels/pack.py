"""Move many tensors into one flat bucket and back, in one compiled call.

The same pass scales, changes the width, and learns whether all is finite and the squared norm.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import numba
import numpy as np
from numba.np.numpy_support import carray

from .compiled import Kernel, compile_kernel, flat
from .elements import ELEMENTS
from .scalars import add_in_any_order, compiled, pointer_to
from .storage import Array, bits, check_divisor
from .table import Packed, PointerTable, check_transfer

_COLUMN = flat(numba.int64, readonly=True)


@compiled
def _transfer(
    source: Any,
    target: Any,
    factor: Any,
    change: Any,
    real: Any,
    stored: Any,
    widen: Any,
    narrow: Any,
    is_finite: Any,
) -> Any:
    square_norm = 0.0
    broken = np.uint32(0)
    for i in range(source.size):
        value = change(real(widen(source[i])), factor)
        result = stored(narrow(value))
        target[i] = result
        square_norm = add_in_any_order(square_norm, np.float64(value) * np.float64(value))
        broken = np.uint32(broken | np.uint32(not is_finite(result)))
    return broken, square_norm


def _arithmetic(tensor_dtype: str) -> Any:
    # A bucket is never wider: see PAIRS.
    return np.float64 if tensor_dtype == "float64" else np.float32


@functools.cache
def pack_kernel(source_dtype: str, bucket_dtype: str) -> Kernel:
    """Return the compiled (addresses, counts, offsets, bucket, scale) behind `pack`."""
    tensor, into = ELEMENTS[source_dtype], ELEMENTS[bucket_dtype]
    real = _arithmetic(source_dtype)
    element, stored = tensor.scalar, into.scalar
    widen, narrow, is_finite, change = tensor.widen, into.narrow, into.is_finite, operator.mul

    def pack_all(addresses: Any, counts: Any, offsets: Any, bucket: Any, scale: Any) -> Any:
        all_finite, square_norm = True, 0.0
        for t in range(addresses.size):
            source = carray(pointer_to(addresses[t], element), counts[t])
            target = bucket[offsets[t] : offsets[t] + counts[t]]
            broken, square = _transfer(
                source, target, scale, change, real, stored, widen, narrow, is_finite
            )
            all_finite = all_finite and broken == 0
            square_norm += square
        return all_finite, square_norm

    return compile_kernel(
        f"pack_{source_dtype}_{bucket_dtype}",
        pack_all,
        _COLUMN,
        _COLUMN,
        _COLUMN,
        flat(into.type),
        numba.from_dtype(real),
    )


@functools.cache
def unpack_kernel(target_dtype: str, bucket_dtype: str) -> Kernel:
    """Return the compiled (addresses, counts, offsets, bucket, divisor) behind `unpack`."""
    tensor, origin = ELEMENTS[target_dtype], ELEMENTS[bucket_dtype]
    real = _arithmetic(target_dtype)
    stored = tensor.scalar
    widen, narrow, is_finite = origin.widen, tensor.narrow, tensor.is_finite
    change = operator.truediv

    def unpack_all(addresses: Any, counts: Any, offsets: Any, bucket: Any, divisor: Any) -> Any:
        all_finite, square_norm = True, 0.0
        for t in range(addresses.size):
            source = bucket[offsets[t] : offsets[t] + counts[t]]
            target = carray(pointer_to(addresses[t], stored), counts[t])
            broken, square = _transfer(
                source, target, divisor, change, real, stored, widen, narrow, is_finite
            )
            all_finite = all_finite and broken == 0
            square_norm += square
        return all_finite, square_norm

    return compile_kernel(
        f"unpack_{target_dtype}_{bucket_dtype}",
        unpack_all,
        _COLUMN,
        _COLUMN,
        _COLUMN,
        flat(origin.type, readonly=True),
        numba.from_dtype(real),
    )


def pack(
    table: PointerTable, source_dtype: str, bucket: Array, bucket_dtype: str, scale: float = 1.0
) -> Packed:
    """Write every tensor of the table, times `scale`, to its place in the bucket.

    Arithmetic is float32, or float64 if the tensors are; from float64 to a half width the value is
    rounded by way of float32.  The bucket's other elements are untouched.  Tensors and bucket must
    not share memory.  A bucket too small is a ValueError before anything is written.
    """
    check_transfer(table, source_dtype, bucket, bucket_dtype, into_bucket=True)
    kernel = pack_kernel(source_dtype, bucket_dtype)
    real = _arithmetic(source_dtype)
    return Packed(*kernel(table.addresses, table.counts, table.offsets, bits(bucket), real(scale)))


def unpack(
    table: PointerTable, target_dtype: str, bucket: Array, bucket_dtype: str, divisor: float = 1.0
) -> Packed:
    """Write every tensor of the table from its place in the bucket, over `divisor`.

    Arithmetic and errors are those of `pack`; the division is a true one.
    """
    check_transfer(table, target_dtype, bucket, bucket_dtype, into_bucket=False)
    check_divisor(divisor)
    kernel = unpack_kernel(target_dtype, bucket_dtype)
    real = _arithmetic(target_dtype)
    return Packed(
        *kernel(table.addresses, table.counts, table.offsets, bits(bucket), real(divisor))
    )
