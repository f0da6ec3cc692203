"""How each dtype name lies in memory, and the checks every kernel makes before it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# NumPy has no bfloat16: its arrays hold the sixteen bits.
STORAGE: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "float16": np.dtype(np.float16),
        "bfloat16": np.dtype(np.uint16),
        "float32": np.dtype(np.float32),
        "float64": np.dtype(np.float64),
        "int8": np.dtype(np.int8),
        "int16": np.dtype(np.int16),
        "int32": np.dtype(np.int32),
        "int64": np.dtype(np.int64),
        "uint8": np.dtype(np.uint8),
        "uint16": np.dtype(np.uint16),
        "uint32": np.dtype(np.uint32),
        "uint64": np.dtype(np.uint64),
        "bool": np.dtype(np.bool_),
        "complex64": np.dtype(np.complex64),
        "complex128": np.dtype(np.complex128),
    }
)

HALVES = ("float16", "bfloat16")
FLOATS = ("float32", "float64")
PARTS: Mapping[str, str] = MappingProxyType({"complex64": "float32", "complex128": "float64"})
"""Complex dtype -> the dtype of its real and its imaginary part, which are added each by itself."""


def listed(names: Any) -> str:
    """Join names as an error message lists them."""
    return ", ".join(str(name) for name in names)


def storage(dtype: str, allowed: tuple[str, ...] = tuple(STORAGE)) -> np.dtype[Any]:
    """Return the NumPy dtype that stores `dtype`; TypeError if it is not among `allowed`."""
    if dtype not in allowed:
        raise TypeError(f"dtype {dtype!r} is not one of {listed(allowed)}")
    return STORAGE[dtype]


def bits(array: Array) -> Array:
    """View half-width storage as uint16, and leave every other array as it is."""
    return array.view(np.uint16) if array.dtype == np.float16 else array


def parts(array: Array) -> Array:
    """View complex storage as real and imaginary parts, and leave every other array as it is."""
    part = PARTS.get(array.dtype.name)
    return array if part is None else array.view(part)


def check_array(array: Array, dtype: str, what: str, *, writes: bool = False) -> None:
    """Refuse an array that a kernel for `dtype` would misread; `what` names it in the error."""
    expected = STORAGE[dtype]
    if array.dtype != expected:
        raise TypeError(f"{what}: expected {expected} storage for {dtype}, got {array.dtype}")
    if array.ndim != 1 or not array.flags.c_contiguous:
        raise ValueError(
            f"{what}: expected a contiguous 1-d array, "
            f"got shape {array.shape} with strides {array.strides}"
        )
    if not array.flags.aligned:
        raise ValueError(f"{what}: memory is not aligned to {expected.itemsize} bytes")
    if writes and not array.flags.writeable:
        raise ValueError(f"{what}: the array is read-only and would be written")


def check_same_size(first: Array, second: Array, names: tuple[str, str]) -> None:
    """Refuse two arrays of different sizes."""
    if first.size != second.size:
        raise ValueError(
            f"{names[0]} has {first.size} elements and {names[1]} has {second.size}; "
            "expected equal sizes"
        )


def check_divisor(divisor: float) -> None:
    """Refuse a divisor of zero: every quotient would be infinite or not a number."""
    if divisor == 0:
        raise ValueError(f"divisor is {divisor}; expected a number other than zero")


def change_by(divisor: float) -> tuple[str, float]:
    """Return ("multiply", factor) or ("divide", divisor), which give the same bits.

    The reciprocal of a power of two is exact, and multiplying is many times cheaper.
    """
    fraction, exponent = math.frexp(divisor)
    if abs(fraction) == 0.5 and abs(exponent) < 100:
        return "multiply", 1.0 / divisor
    return "divide", divisor
