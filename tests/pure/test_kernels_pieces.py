"""Arithmetic behind an address equals the kernels that Python calls."""

from typing import Any

import numpy as np
import pytest

from ringfold.kernels import cast, pieces, reduce
from ringfold.kernels.storage import STORAGE

CASES = [
    ("sum", "float32"),
    ("prod", "float64"),
    ("min", "float16"),
    ("max", "bfloat16"),
    ("sum", "bfloat16"),
    ("max", "int8"),
    ("sum", "uint64"),
    ("min", "bool"),
    ("sum", "complex128"),
]


def call(address: int, target: Any, incoming: Any, divisor: float = 1.0) -> None:
    """Call through compiled code, as the executors do."""
    import ctypes

    record = np.zeros(4, np.int64)
    record[:3] = target.ctypes.data, incoming.ctypes.data, incoming.size
    record.view(np.float64)[3] = divisor
    ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(address)(record.ctypes.data)


def elements(dtype: str, count: int, seed: int) -> Any:
    values = np.random.default_rng(seed).integers(0, 9, count)
    if dtype == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return (values * (1 - 2j) if dtype.startswith("complex") else values).astype(STORAGE[dtype])


@pytest.mark.parametrize("count", [0, 1, 3, 1001])
@pytest.mark.parametrize(("op", "dtype"), CASES)
def test_combine(op: str, dtype: str, count: int) -> None:
    mine, theirs = elements(dtype, count, 1), elements(dtype, count, 2)
    right = mine.copy()
    reduce.combine(op, dtype)(right, theirs)
    call(pieces.combine_callback(op, dtype), mine, theirs)
    np.testing.assert_array_equal(mine, right)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_widths_are_widened_accumulated_and_narrowed(dtype: str) -> None:
    first, second = elements(dtype, 1001, 1), elements(dtype, 1001, 2)
    wide, right = np.full(1001, np.nan, np.float32), np.empty(1001, np.float32)
    cast.widen(first, right, dtype)
    call(pieces.widen_callback(dtype), wide, first, 4.0)
    np.testing.assert_array_equal(wide, right / 4)

    more = np.empty(1001, np.float32)
    cast.widen(second, more, dtype)
    call(pieces.accumulate_callback("mean", dtype), wide, second, 4.0)
    np.testing.assert_array_equal(wide, right / 4 + more / 4)
    call(pieces.accumulate_callback("max", dtype), wide, second, 4.0)
    np.testing.assert_array_equal(wide, np.maximum(right / 4 + more / 4, more))

    narrow, expected = np.empty_like(first), np.empty_like(first)
    cast.narrow(wide, expected, dtype, 3.0)
    call(pieces.narrow_callback(dtype), narrow, wide, 3.0)
    np.testing.assert_array_equal(narrow, expected)
