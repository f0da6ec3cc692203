"""One element at a time: half-width bits to float32 and back, and the order of floats.

These are plain functions that Numba compiles into the loops that call them.  Being module-level
functions, they are known by name to Numba's cache, which a closure over compiled functions is not.
Formats: IEEE 754-2019 section 3.6 (binary16); bfloat16 is the upper half of binary32.
Nothing here depends on whether the processor flushes subnormal numbers to zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import float32, types, uint32
from numba.extending import intrinsic, register_jitable

compiled = register_jitable(error_model="numpy")


def builtin(define: Callable[..., Any]) -> Any:
    """Make an LLVM generator a function of compiled code, of a type that mypy does not check."""
    return intrinsic(define)


# Numba computes with 64-bit integers: without a cast after every step each vector lane would hold
# 64 bits, at half the speed.
u32 = np.uint32

# Numba annotates some of its functions only.
_pointer_type: Any = types.CPointer


@builtin
def float32_bits(_context: Any, value: Any) -> Any:
    """Return the bits of a float32 as uint32."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(uint32))

    return (uint32(value), generate) if value == float32 else None


@builtin
def float32_from_bits(_context: Any, bits: Any) -> Any:
    """Return the float32 whose bits are a uint32."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(float32))

    return (float32(bits), generate) if bits == uint32 else None


@builtin
def add_in_any_order(_context: Any, total: Any, term: Any) -> Any:
    """Return the sum of two float64, as part of a total that the compiler may reorder.

    Without this freedom a total is a chain of additions, each waiting for the one before.
    """

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments, flags=("reassoc",))

    return types.float64(types.float64, types.float64), generate


@builtin
def pointer_to(_context: Any, address: Any, element: Any) -> Any:
    """Return the integer `address` as a pointer to the NumPy scalar type `element`."""
    pointer: Any = _pointer_type(element.instance_type)

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(types.int64, element), generate


@compiled
def float16_to_float32(bits: Any) -> Any:
    """Return the float32 that the binary16 `bits` stand for."""
    wide = u32(bits)
    sign = u32(u32(wide & u32(0x8000)) << u32(16))
    magnitude = u32(wide & u32(0x7FFF))
    rebias = u32((127 - 15) << 23)
    normal = u32(u32(magnitude << u32(13)) + rebias)
    # The all-ones exponent of infinities and NaNs needs the same shift a second time.
    special = u32(normal + rebias)
    subnormal = float32_bits(np.float32(np.int32(magnitude)) * np.float32(2.0**-24))
    upper = special if magnitude >= u32(0x7C00) else normal
    unsigned = subnormal if magnitude < u32(0x0400) else upper
    return float32_from_bits(u32(unsigned | sign))


@compiled
def float32_to_float16(value: Any) -> Any:
    """Return the binary16 bits nearest to `value`, ties to even; NaN stays NaN, quiet."""
    bits = float32_bits(np.float32(value))
    sign = u32(u32(bits >> u32(16)) & u32(0x8000))
    magnitude = u32(bits & u32(0x7FFFFFFF))
    odd = u32(u32(magnitude >> u32(13)) & u32(1))
    # Changes the exponent's bias and adds just under half a unit, so that a tie goes up if odd.
    rebias_and_round = u32(0x0FFF - ((127 - 15) << 23) & 0xFFFFFFFF)
    normal = u32(u32(u32(magnitude + rebias_and_round) + odd) >> u32(13))
    # Between 1/2 and 1 a float32 counts in units of 2**-24, as binary16 does below 2**-14:
    # adding 1/2 rounds to those units, and the sum's low bits are the result.
    half = np.float32(0.5)
    subnormal = u32(float32_bits(float32_from_bits(magnitude) + half) - float32_bits(half))
    rounded = subnormal if magnitude < u32(0x38800000) else normal
    bounded = u32(0x7C00) if magnitude >= u32(0x477FF000) else rounded
    nan = u32(u32(u32(magnitude >> u32(13)) & u32(0x03FF)) | u32(0x7E00))
    unsigned = nan if magnitude > u32(0x7F800000) else bounded
    return np.uint16(u32(unsigned | sign))


@compiled
def bfloat16_to_float32(bits: Any) -> Any:
    """Return the float32 that the bfloat16 `bits` stand for."""
    return float32_from_bits(u32(u32(bits) << u32(16)))


@compiled
def float32_to_bfloat16(value: Any) -> Any:
    """Return the bfloat16 bits nearest to `value`, ties to even; NaN stays NaN, quiet."""
    bits = float32_bits(np.float32(value))
    is_nan = u32(bits & u32(0x7FFFFFFF)) > u32(0x7F800000)
    odd = u32(u32(bits >> u32(16)) & u32(1))
    up = u32(0) if is_nan else u32(u32(0x7FFF) + odd)
    quiet = u32(0x0040) if is_nan else u32(0)
    return np.uint16(u32(u32(u32(bits + up) >> u32(16)) | quiet))


@compiled
def identity(value: Any) -> Any:
    """Return `value`."""
    return value


@compiled
def keep(value: Any, _divisor: Any) -> Any:
    """Return `value`, where `divide` would take it over a divisor."""
    return value


@compiled
def divide(value: Any, divisor: Any) -> Any:
    """Return `value` over `divisor`."""
    return value / divisor


@compiled
def float_minimum(first: Any, second: Any) -> Any:
    """Return the smaller float, NaN if either is NaN, and -0.0 before 0.0 in either order."""
    smaller = first < second or first != first
    tie_first = first == second and np.signbit(first)
    return first if smaller or tie_first else second


@compiled
def float_maximum(first: Any, second: Any) -> Any:
    """Return the larger float, NaN if either is NaN, and 0.0 after -0.0 in either order."""
    larger = first > second or first != first
    tie_first = first == second and np.signbit(second)
    return first if larger or tie_first else second


@compiled
def integer_minimum(first: Any, second: Any) -> Any:
    """Return the smaller integer."""
    return first if first < second else second


@compiled
def integer_maximum(first: Any, second: Any) -> Any:
    """Return the larger integer."""
    return first if first > second else second


@compiled
def float_is_finite(value: Any) -> Any:
    """Return whether a float is neither infinite nor NaN."""
    return value - value == 0.0


@compiled
def float16_is_finite(bits: Any) -> Any:
    """Return whether binary16 bits are neither infinite nor NaN."""
    return (bits & np.uint16(0x7C00)) != np.uint16(0x7C00)


@compiled
def bfloat16_is_finite(bits: Any) -> Any:
    """Return whether bfloat16 bits are neither infinite nor NaN."""
    return (bits & np.uint16(0x7F80)) != np.uint16(0x7F80)
