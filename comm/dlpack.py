"""Read a DLPack capsule: the memory of any array library, without importing that library.

Source: DLPack, dlpack.h, structures DLTensor, DLManagedTensor (ABI version 0) and
DLManagedTensorVersioned (version 1).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from .device import library_of
from .dtypes import DType, dtype_named

HOST_DEVICES = (1, 3)
"""kDLCPU and kDLCUDAHost (pinned memory)."""

_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
_FLOAT8 = ("e3m4", "e4m3", "e4m3b11fnuz", "e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")
"""From code 7 on."""


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_READ_ONLY = 1
"""Of a versioned one's flags."""

_WRITABLE = ("torch",)
"""Libraries whose arrays may all be written to, also those that a capsule of version 0 tells of."""


class _Memory:
    """Publish an address to NumPy and keep the capsule that owns it alive."""

    def __init__(self, capsule: Any, interface: dict[str, Any]) -> None:
        self.capsule = capsule
        self.__array_interface__ = interface


def read_host(x: Any) -> tuple[np.ndarray[Any, np.dtype[Any]], DType]:
    """Return a strided NumPy view of x's host memory, and its element type.

    x has `__dlpack__` and `__dlpack_device__`. Nothing is copied; the view keeps the memory alive.
    It is read-only where x says so, or cannot say, before version 1, and is not known to be else.

    Raises: TypeError for memory of a device, or an element type that the table lacks.
    """
    try:
        device = int(x.__dlpack_device__()[0])
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise TypeError(f"{type(x).__name__} has no memory to move: {error}") from None
    if device not in HOST_DEVICES:
        raise TypeError(
            f"{type(x).__name__} lies in device memory (DLPack device type {device}); "
            "only host memory can be moved here"
        )
    try:
        capsule = _export(x)
    except (BufferError, ValueError, RuntimeError) as error:
        raise TypeError(f"{type(x).__name__} does not export its memory: {error}") from None
    tensor, read_only = _tensor_of(capsule)
    if read_only is None:
        read_only = library_of(x) not in _WRITABLE
    dtype = _dtype(tensor)
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    if 0 in shape:
        # Memory of no elements may have no address.
        return np.empty(shape, dtype.storage), dtype
    strides = None
    if tensor.strides:
        strides = tuple(tensor.strides[axis] * dtype.itemsize for axis in range(tensor.ndim))
    interface = {
        "version": 3,
        "shape": shape,
        "strides": strides,
        "typestr": dtype.storage.str,
        "data": (tensor.data + tensor.byte_offset, read_only),
    }
    return np.asarray(_Memory(capsule, interface)), dtype


def _export(x: Any) -> Any:
    try:
        return x.__dlpack__(max_version=(1, 0))
    except TypeError:  # of a library that knows version 0 alone
        return x.__dlpack__()


def _tensor_of(capsule: Any) -> tuple[_Tensor, bool | None]:
    """Return what a capsule tells of, and whether that is read-only; None where it cannot say."""
    get_name, get_pointer = _accessors()
    name = get_name(capsule)
    address = get_pointer(capsule, name)
    if name == b"dltensor":
        return _Tensor.from_address(address), None
    versioned = _Versioned.from_address(address)
    return versioned.tensor, bool(versioned.flags & _READ_ONLY)


@functools.cache
def _accessors() -> tuple[Callable[..., bytes], Callable[..., int]]:
    """Return what reads a capsule's name, and its pointer.

    Functions of our own, as those of `pythonapi` are shared, with their types, by all who use them.
    """
    named = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)
    pointing = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    api = ctypes.pythonapi
    return named(("PyCapsule_GetName", api)), pointing(("PyCapsule_GetPointer", api))


def _dtype(tensor: _Tensor) -> DType:
    if 0 <= tensor.code - 7 < len(_FLOAT8):
        name = f"float8_{_FLOAT8[tensor.code - 7]}"
        raise TypeError(
            f"dtype {name} is not supported; its bytes can be moved: view them as uint8"
        )
    code = _CODES.get(tensor.code, f"code{tensor.code}_")
    if tensor.lanes != 1:
        raise TypeError(f"DLPack elements of {tensor.lanes} lanes are not supported")
    return dtype_named(code if code == "bool" else f"{code}{tensor.bits}")
