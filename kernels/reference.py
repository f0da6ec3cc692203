"""The NumPy definition of every kernel: slow, plain, and what the tests compare with.

Results equal the compiled kernels' to the last bit, with two freedoms: any NaN stands for any
other, and `Packed.square_norm` may differ by the order of its additions (`norm_tolerance`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from .operations import check_operation
from .storage import (
    FLOATS,
    HALVES,
    STORAGE,
    Array,
    check_array,
    check_divisor,
    check_same_size,
    parts,
    storage,
)
from .table import Packed, PointerTable, check_transfer

Fold = Callable[[Array, Array], None]


def _from_bfloat16(source: Array) -> Array:
    return (source.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values: Array) -> Array:
    pattern = values.view(np.uint32).astype(np.uint64)
    rounded = (pattern + 0x7FFF + (pattern >> 16 & 1)) >> 16
    quiet = pattern >> 16 | 0x0040
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def to_float32(source: Array, dtype: str) -> Array:
    """Return float or half-width storage as float32 values."""
    return _from_bfloat16(source) if dtype == "bfloat16" else source.astype(np.float32)


def from_float32(values: Array, dtype: str) -> Array:
    """Return float32 values as storage of `dtype`, rounded to nearest, ties to even."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return _to_bfloat16(values) if dtype == "bfloat16" else values.astype(STORAGE[dtype])


def widen(source: Array, target: Array, dtype: str) -> None:
    """Define `cast.widen`."""
    storage(dtype, HALVES)
    check_array(source, dtype, "source")
    check_array(target, "float32", "target", writes=True)
    check_same_size(source, target, ("source", "target"))
    target[:] = to_float32(source, dtype)


def narrow(source: Array, target: Array, dtype: str, divisor: float = 1.0) -> None:
    """Define `cast.narrow`."""
    storage(dtype, HALVES)
    check_array(source, "float32", "source")
    check_array(target, dtype, "target", writes=True)
    check_same_size(source, target, ("source", "target"))
    check_divisor(divisor)
    with np.errstate(all="ignore"):
        target[:] = from_float32(source / np.float32(divisor), dtype)


def _minimum(first: Array, second: Array) -> Array:
    if first.dtype.kind != "f":
        return np.minimum(first, second)
    tie = np.where(np.signbit(first), first, second)
    return np.where(first == second, tie, np.minimum(first, second))


def _maximum(first: Array, second: Array) -> Array:
    if first.dtype.kind != "f":
        return np.maximum(first, second)
    tie = np.where(np.signbit(first), second, first)
    return np.where(first == second, tie, np.maximum(first, second))


_OPS: Mapping[str, Callable[[Any, Any], Any]] = MappingProxyType(
    {"sum": np.add, "prod": np.multiply, "min": _minimum, "max": _maximum}
)


def combine(op: str, dtype: str) -> Fold:
    """Define `reduce.combine`."""
    check_operation(op, dtype)
    operation = _OPS[op]

    def plain(target: Array, incoming: Array) -> None:
        check_same_size(target, incoming, ("target", "incoming"))
        with np.errstate(all="ignore"):
            target[:] = operation(target, incoming)

    def through_float32(target: Array, incoming: Array) -> None:
        check_same_size(target, incoming, ("target", "incoming"))
        with np.errstate(all="ignore"):
            wide = operation(to_float32(target, dtype), to_float32(incoming, dtype))
        target[:] = from_float32(wide, dtype)

    return through_float32 if dtype in HALVES else plain


def accumulate(op: str, dtype: str) -> Fold:
    """Define `reduce.accumulate`."""
    check_operation(op, dtype, among=HALVES)
    operation = _OPS[op]

    def fold(target: Array, incoming: Array) -> None:
        check_same_size(target, incoming, ("target", "incoming"))
        with np.errstate(all="ignore"):
            target[:] = operation(target, to_float32(incoming, dtype))

    return fold


def divide(target: Array, divisor: float) -> None:
    """Define `reduce.divide`."""
    check_divisor(divisor)
    target = parts(target)
    storage(target.dtype.name, FLOATS)
    check_array(target, target.dtype.name, "target", writes=True)
    with np.errstate(all="ignore"):
        target[:] = target / target.dtype.type(divisor)


def _tensors(table: PointerTable, dtype: str) -> list[Array]:
    kind = STORAGE[dtype]
    return [
        np.frombuffer((ctypes.c_char * (count * kind.itemsize)).from_address(address), dtype=kind)
        if count
        else np.empty(0, kind)
        for address, count in zip(table.addresses.tolist(), table.counts.tolist(), strict=True)
    ]


def _transfer(
    source: Array,
    source_dtype: str,
    target: Array,
    target_dtype: str,
    change: Callable[[Array, Any], Array],
    factor: float,
) -> Packed:
    wide = "float64" in (source_dtype, target_dtype)
    real = np.float64 if wide else np.float32
    values = source if source_dtype == "float64" else to_float32(source, source_dtype)
    with np.errstate(all="ignore"):
        changed = change(values.astype(real), real(factor))
        target[:] = (
            changed
            if target_dtype == "float64"
            else from_float32(changed.astype(np.float32), target_dtype)
        )
        stored = target if target_dtype == "float64" else to_float32(target, target_dtype)
        square_norm = float(np.sum(np.square(changed.astype(np.float64))))
    return Packed(bool(np.isfinite(stored).all()), square_norm)


def _total(parts: list[Packed]) -> Packed:
    return Packed(all(part.finite for part in parts), sum(part.square_norm for part in parts))


def pack(
    table: PointerTable, source_dtype: str, bucket: Array, bucket_dtype: str, scale: float = 1.0
) -> Packed:
    """Define `pack.pack`."""
    check_transfer(table, source_dtype, bucket, bucket_dtype, into_bucket=True)
    return _total(
        [
            _transfer(
                tensor,
                source_dtype,
                bucket[start : start + tensor.size],
                bucket_dtype,
                np.multiply,
                scale,
            )
            for start, tensor in zip(
                table.offsets.tolist(), _tensors(table, source_dtype), strict=True
            )
        ]
    )


def unpack(
    table: PointerTable, target_dtype: str, bucket: Array, bucket_dtype: str, divisor: float = 1.0
) -> Packed:
    """Define `pack.unpack`."""
    check_transfer(table, target_dtype, bucket, bucket_dtype, into_bucket=False)
    check_divisor(divisor)
    return _total(
        [
            _transfer(
                bucket[start : start + tensor.size],
                bucket_dtype,
                tensor,
                target_dtype,
                np.true_divide,
                divisor,
            )
            for start, tensor in zip(
                table.offsets.tolist(), _tensors(table, target_dtype), strict=True
            )
        ]
    )


def pack_add(table: PointerTable, source_dtype: str, bucket: Array, bucket_dtype: str) -> Packed:
    """Define `device.pack.pack_add`."""
    check_transfer(table, source_dtype, bucket, bucket_dtype, into_bucket=True)
    parts = []
    for start, tensor in zip(table.offsets.tolist(), _tensors(table, source_dtype), strict=True):
        present = bucket[start : start + tensor.size].copy()
        wide = present if bucket_dtype == "float64" else to_float32(present, bucket_dtype)

        def add(values: Array, _factor: Any, wide: Array = wide) -> Array:
            return np.add(values, wide, dtype=values.dtype)

        target = bucket[start : start + tensor.size]
        parts.append(_transfer(tensor, source_dtype, target, bucket_dtype, add, 1.0))
    return _total(parts)


def fold(
    op: str,
    dtype: str,
    sources: list[Array],
    targets: list[Array],
    first: float = 1.0,
    last: float = 1.0,
) -> None:
    """Define `fold.fold_callback` and `device.fold.fold`: equally long arrays, in their order."""
    mean, half = op == "mean", dtype in HALVES
    operation = _OPS["sum" if mean else op]
    with np.errstate(all="ignore"):
        values = [to_float32(source, dtype) if half else source for source in sources]
        if mean and half:
            values = [value / np.float32(first) for value in values]
        total = values[0].copy()
        for value in values[1:]:
            total = operation(total, value)
        if mean:
            total = total / total.dtype.type(last)
        result = from_float32(total, dtype) if half else total
    for target in targets:
        target[:] = result


def threshold(source: Array, dtype: str, wanted: int) -> tuple[float, int]:
    """Define `device.threshold.threshold`: the wanted-th largest magnitude, and how many are above.

    By the bits of the magnitudes, so that NaN comes before infinity.
    """
    bits = np.sort(to_float32(source, dtype).view(np.uint32) & 0x7FFFFFFF)[::-1]
    found = bits[wanted - 1 : wanted]
    return float(found.view(np.float32)[0]), int((bits > found[0]).sum())


def norm_tolerance(num_elements: int) -> float:
    """Bound the relative difference of two orders of adding `num_elements` squares in float64.

    Each sum of n non-negative terms is within (n - 1) u / (1 - (n - 1) u) of the exact one, with
    u = 2**-53 (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2); two differ by
    twice that.
    """
    return 2.0 * max(num_elements, 1) * 2.0**-53 * 1.01
