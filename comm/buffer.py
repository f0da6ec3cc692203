"""A flat view over whatever memory a user passes; no copies where the memory is contiguous."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from ctypes import addressof, c_char
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial
from numbers import Number
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from . import dlpack
from .device import bare, library_of, on_device
from .dtypes import DType, Typed, dtype_named
from .memory import Memory

Array = npt.NDArray[Any]

_ON_HOST: Mapping[str, Mapping[str, str]] = MappingProxyType({"torch": {"device": "cpu"}})
"""Array library -> what its `empty` takes so that no default device of the program counts."""

_IN_AN_ARRAY = "pass it as np.array([x])"


@dataclass(frozen=True)
class Buffer:
    """One user array, flattened in logical (row-major) order.

    owner: what the user passed.  view: its memory, strided, shaped as the user's.
    flat: 1-D, contiguous, aligned; the same memory as view, or memory of its own where `staged`,
    which stage() fills and commit() brings back.
    family: the array library's name, such as "numpy" or "torch".
    keeps: results like it are made once for a shape, and written again.
    """

    owner: Any
    view: Array
    flat: Array
    dtype: DType
    family: str
    keeps: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the user's shape."""
        return self.view.shape

    @property
    def staged(self) -> bool:
        """Tell whether flat is a copy."""
        return self.view.size > 0 and not _is_flat(self.view)

    def stage(self) -> None:
        """Copy the user's elements into flat where flat is memory of its own."""
        if self.staged:
            self.flat[...] = self.view.reshape(-1)

    def commit(self) -> None:
        """Copy flat back into the user's elements where flat is memory of its own."""
        if self.staged:
            self.view[...] = self.flat.reshape(self.view.shape)

    def like(self, shape: tuple[int, ...]) -> Any:
        """Return an array of the same library and element type, new where none is kept."""
        return self.maker(shape)

    @cached_property
    def maker(self) -> Callable[[tuple[int, ...]], Any]:
        """Return what makes arrays like this one, without keeping this one's memory alive."""
        if isinstance(self.owner, np.ndarray):
            make: Callable[[tuple[int, ...]], Any] = partial(np.empty, dtype=self.owner.dtype)
        else:
            make = allocator(self.family, self.dtype)
        return cache(make) if self.keeps else make


def address_of(array: np.ndarray[Any, Any]) -> int:
    """Return where an array begins, several times as fast as by its `ctypes`."""
    try:
        return addressof(c_char.from_buffer(array.data))
    except (BufferError, TypeError, ValueError):  # read-only, strided, without elements, ...
        return int(array.__array_interface__["data"][0])


def address_in(result: Any) -> int:
    """Return where an array begins that `like` has made, of whatever library."""
    if isinstance(result, np.ndarray):
        return address_of(result)
    if hasattr(result, "data_ptr"):
        return int(result.data_ptr())
    return address_of(wrap(result, writable=True).flat)


def wrap(x: Any, *, writable: bool, what: str = "x", keeps: bool = False) -> Buffer:
    """View x as a Buffer; `writable` where a result will be written into it.

    keeps: see Buffer.

    Raises: TypeError for what is no array, or of an unsupported type or device; ValueError for a
    target that is read-only or maps several elements to one address.
    """
    view, dtype = _view(x, what)
    if writable:
        _require_target(x, view, what)
    flat = view.reshape(-1) if _is_flat(view) else np.empty(view.size, view.dtype)
    return Buffer(x, view, flat, dtype, library_of(x), keeps)


def _is_flat(view: Array) -> bool:
    """Tell whether kernels can take a view as it lies; what they take has to be aligned, too."""
    flags = view.flags
    return flags.c_contiguous and flags.aligned


def allocate(family: str, shape: tuple[int, ...], dtype: DType) -> Any:
    """Return an uninitialised array, in host memory, of an array library named as its module."""
    return allocator(family, dtype)(shape)


def allocator(family: str, dtype: DType) -> Callable[[tuple[int, ...]], Any]:
    """Return what makes such arrays of a shape.

    Falls back to NumPy for libraries without `empty` and dtypes as attributes.
    """
    module = importlib.import_module(family) if family not in ("numpy", "builtins") else np
    if not hasattr(module, "empty") or not hasattr(module, dtype.name):
        return partial(np.empty, dtype=_of_numpy(dtype))
    return partial(module.empty, dtype=getattr(module, dtype.name), **_ON_HOST.get(family, {}))


def _of_numpy(dtype: DType) -> Any:
    """Return NumPy's type, or its extension's that a rank passes bfloat16 in; else the bits."""
    if dtype.name == dtype.storage.name:
        return dtype.storage
    try:
        return getattr(importlib.import_module("ml_dtypes"), dtype.name)
    except (ImportError, AttributeError):
        return dtype.storage


def element_of(dtype: Any) -> tuple[str, DType, np.dtype[Any]]:
    """Return the library of a dtype, its row of the table, and what holds it in NumPy.

    Raises: TypeError for one that no operation takes.
    """
    family, _, name = str(dtype).rpartition(".")
    if family == "torch":
        row = dtype_named(name)
        return family, row, row.storage
    storage = np.dtype(dtype)
    return "numpy", _row_of(storage), storage


@lru_cache(maxsize=256)
def _row_of(dtype: np.dtype[Any]) -> DType:
    row = dtype_named(dtype.name)
    if not dtype.isnative:
        raise TypeError(f"byte order of {dtype.str} is not this machine's")
    return row


def ordinary(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return an uninitialised array of NumPy's or of another library's dtype."""
    family, row, storage = element_of(dtype)
    return np.empty(shape, storage) if family == "numpy" else allocate(family, shape, row)


def registered(memory: Memory, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return an array of NumPy's or of another library's dtype in a rank's shared memory."""
    family, _, storage = element_of(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * storage.itemsize
    plain = memory.lend(nbytes).view(storage).reshape(shape)
    if family == "numpy":
        return plain
    return importlib.import_module(family).from_dlpack(plain).view(dtype)


def _from_numpy(x: Any) -> tuple[Array, DType]:
    if type(x) is not np.ndarray:
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError("a masked array, whose mask is not moved; pass filled() or data of it")
        x = x.view(np.ndarray)  # a matrix, say, stays 2-D however it is reshaped
    dtype = _row_of(x.dtype)
    # bfloat16 of an extension package has the bits, but not the arithmetic.
    return (x if x.dtype == dtype.storage else x.view(dtype.storage)), dtype


def _from_dlpack(x: Any) -> tuple[Array, DType]:
    # A tensor that requires a gradient does not export its memory; the same memory detached does.
    return dlpack.read_host(bare(x))


def _from_buffer(x: Any) -> tuple[Array, DType]:
    return _from_numpy(np.asarray(memoryview(x)))


def _refuse_device(x: Any) -> tuple[Array, DType]:
    raise TypeError(
        f"{type(x).__module__}.{type(x).__name__} lies in GPU memory; this takes host memory only, "
        "so copy it there first"
    )


def _speaks_buffer(x: Any) -> bool:
    try:
        memoryview(x)
    except TypeError:
        return False
    return True


_ADAPTERS: tuple[tuple[Callable[[Any], bool], Callable[[Any], tuple[Array, DType]]], ...] = (
    (lambda x: isinstance(x, np.ndarray), _from_numpy),
    (on_device, _refuse_device),
    (lambda x: hasattr(x, "__dlpack__"), _from_dlpack),
    (_speaks_buffer, _from_buffer),
    (lambda x: isinstance(x, Typed), lambda x: (x.view, x.dtype)),
)


def _view(x: Any, what: str) -> tuple[Array, DType]:
    for fits, adapt in _ADAPTERS:
        if fits(x):
            try:
                return adapt(x)
            except TypeError as error:
                raise TypeError(f"{what}: {error}") from None
    hint = f"; {_IN_AN_ARRAY}" if isinstance(x, Number) else ""
    raise TypeError(
        f"{what}: expected an array (NumPy, torch, DLPack or buffer protocol), "
        f"got {type(x).__name__}{hint}"
    )


def _require_target(x: Any, view: Array, what: str) -> None:
    if not view.flags.writeable:
        scalar = isinstance(x, np.generic)  # as np.sum returns, and as mpi4py's allreduce takes
        hint = f"a NumPy scalar is read-only; {_IN_AN_ARRAY}"
        shown = hint if scalar else "the array is read-only"
        raise ValueError(f"{what}: the result is written in place, but {shown}")
    extent = view.itemsize
    steps = sorted(
        (abs(step), length)
        for step, length in zip(view.strides, view.shape, strict=True)
        if length > 1
    )
    if view.size == 0:
        return
    for step, length in steps:
        if step < extent:
            raise ValueError(
                f"{what}: the result is written in place, but shape {view.shape} with strides "
                f"{view.strides} bytes maps several elements to one address; pass a copy"
            )
        extent += step * (length - 1)
