"""Choose the means of the kernels: LLVM instructions on a GPU, their twins in the simulator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from ..storage import PARTS, STORAGE

Function = Callable[..., Any]


@dataclass(frozen=True)
class Primitives:
    """What kernels call below the level of arrays; see `generated` for each one's meaning."""

    load: Function
    store: Function
    load_fresh: Function
    load_lanes: Function
    store_lanes: Function
    atomic_add: Function
    float32_bits: Function
    float32_product: Function
    word_product_high: Function
    float16_to_float32: Function
    float32_to_float16: Function
    bfloat16_to_float32: Function
    float32_to_bfloat16: Function
    compiled: Callable[[Function], Function]


def simulating() -> bool:
    """Tell whether Numba runs kernels in its CUDA simulator, on host memory."""
    from numba import config

    return bool(config.ENABLE_CUDASIM)  # type: ignore[attr-defined]


@functools.cache
def primitives() -> Primitives:
    """Return the primitives of this process."""
    names = [name for name in Primitives.__dataclass_fields__ if name != "compiled"]
    if simulating():
        from . import simulated

        return Primitives(**{name: getattr(simulated, name) for name in names}, compiled=_as_it_is)
    from numba.cuda.extending import intrinsic, register_jitable

    from . import generated
    from .numba_numpy import load_registries

    load_registries()  # before anything is compiled: every kernel is made of these
    made = {name: intrinsic(getattr(generated, name)) for name in names}
    return Primitives(**made, compiled=register_jitable)


def _as_it_is(function: Function) -> Function:
    return function


@dataclass(frozen=True)
class DeviceElement:
    """How one dtype is stored, computed with and checked, in a kernel.

    `scalar` is the NumPy type in memory, `wide` that of the arithmetic; `widen` and `narrow` lead
    from one to the other; `is_finite` takes what is stored. `lanes` of them are 16 bytes.
    """

    scalar: Any
    wide: Any
    widen: Function
    narrow: Function
    is_finite: Function

    @property
    def size(self) -> int:
        """Return the bytes of one element."""
        return int(np.dtype(self.scalar).itemsize)

    @property
    def lanes(self) -> int:
        """Return how many elements are 16 bytes."""
        return 16 // self.size


_MASKS: Mapping[str, int] = MappingProxyType({"float16": 0x7C00, "bfloat16": 0x7F80})
"""Half-width dtype -> the bits of its exponent: all set in infinities and NaN."""


@functools.cache
def element(dtype: str) -> DeviceElement:
    """Return the element of a dtype; TypeError for a complex one. bool is a byte of 0 or 1 here."""
    if dtype in PARTS:
        raise TypeError(f"GPUs have no kernels for {dtype}; pass its parts, as {PARTS[dtype]}")
    p = primitives()
    if dtype in _MASKS:
        mask = np.uint16(_MASKS[dtype])

        to_half = getattr(p, f"float32_to_{dtype}")

        def half_is_finite(bits: Any) -> Any:
            return (bits & mask) != mask

        def narrow(value: Any) -> Any:
            return to_half(np.float32(value))

        return DeviceElement(
            np.uint16,
            np.float32,
            getattr(p, f"{dtype}_to_float32"),
            p.compiled(narrow),
            p.compiled(half_is_finite),
        )
    scalar = np.uint8 if dtype == "bool" else STORAGE[dtype].type

    def identity(value: Any) -> Any:
        return value

    def is_finite(value: Any) -> Any:
        return value - value == 0

    def stored(value: Any) -> Any:
        # Numba computes with integers of 64 bits; as stored they wrap.
        return scalar(value)

    return DeviceElement(
        scalar, scalar, p.compiled(identity), p.compiled(stored), p.compiled(is_finite)
    )
