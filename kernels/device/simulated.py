"""The twins of `generated` for Numba's CUDA simulator: the same functions on host memory."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np

from .. import reference
from ..storage import STORAGE

_LOCK = threading.Lock()


def _memory(address: int, kind: Any, count: int = 1) -> Any:
    dtype = np.dtype(kind)
    raw = (ctypes.c_char * (dtype.itemsize * count)).from_address(int(address))
    return np.frombuffer(raw, dtype)


def load(address: int, element: Any) -> Any:
    """Return one element."""
    return _memory(address, element)[0]


def store(address: int, value: Any) -> None:
    """Write one element."""
    _memory(address, type(value))[0] = value


def _aligned(address: int) -> int:
    if address % 16:
        raise ValueError(f"address {address:#x} is not aligned to 16 bytes, as lanes must be")
    return address


def load_lanes(address: int, element: Any) -> Any:
    """Return 16 bytes as a tuple; ValueError where a GPU would fail with a misaligned address."""
    return tuple(_memory(_aligned(address), element, 16 // np.dtype(element).itemsize))


def store_lanes(address: int, lanes: Any) -> None:
    """Write a tuple of 16 bytes; ValueError as `load_lanes`."""
    kinds = {type(lane) for lane in lanes}
    if len(kinds) != 1 or len(lanes) * np.dtype(type(lanes[0])).itemsize != 16:
        raise TypeError(f"expected 16 bytes of one type, got {len(lanes)} lanes of {kinds}")
    _memory(_aligned(address), type(lanes[0]), len(lanes))[:] = lanes


def atomic_add(address: int, value: Any) -> Any:
    """Add an integer, and return what was there."""
    with _LOCK:
        cell = _memory(address, type(value))
        before = cell[0]
        cell[0] = before + value
    return before


def float32_bits(value: Any) -> Any:
    """Return the bits of a float32 as uint32."""
    return np.float32(value).view(np.uint32)


def float32_product(first: Any, second: Any) -> Any:
    """Return a product, rounded."""
    return np.float32(first) * np.float32(second)


def word_product_high(first: Any, second: Any) -> Any:
    """Return the upper 64 bits of a product of 128."""
    return np.uint64(int(first) * int(second) >> 64)


def _widened(bits: Any, dtype: str) -> Any:
    return reference.to_float32(np.array([bits], np.uint16).view(STORAGE[dtype]), dtype)[0]


def _narrowed(value: Any, dtype: str) -> Any:
    return reference.from_float32(np.array([value], np.float32), dtype).view(np.uint16)[0]


def float16_to_float32(bits: Any) -> Any:
    """Return the float32 of binary16 bits."""
    return _widened(bits, "float16")


def float32_to_float16(value: Any) -> Any:
    """Return the nearest binary16 bits."""
    return _narrowed(value, "float16")


def bfloat16_to_float32(bits: Any) -> Any:
    """Return the float32 of bfloat16 bits."""
    return _widened(bits, "bfloat16")


def float32_to_bfloat16(value: Any) -> Any:
    """Return the nearest bfloat16 bits."""
    return _narrowed(value, "bfloat16")


load_fresh = load
