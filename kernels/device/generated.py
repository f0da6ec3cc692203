"""What a kernel needs below the level of arrays, as LLVM instructions: memory by address, and bits.

Each function here types one call and generates its code; `primitives` makes Numba CUDA's intrinsics
of them. The code is the same for every LLVM target, so that the tests can run it on the host.
Addresses are of global memory (address space 1), so loads and stores name it in the instruction.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

VECTOR_BYTES = 16

_WORD = ir.IntType(32)
_HALF_WORD = ir.IntType(16)
_VECTOR = ir.VectorType(_WORD, VECTOR_BYTES // 4)


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(kind, addrspace=1))


def load(_context: Any, _address: Any, element: Any) -> Any:
    """Type and generate `load(address, element)`: one element."""
    kind = element.instance_type

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load(_pointer(builder, arguments[0], context.get_value_type(kind)))

    return kind(types.int64, element), generate


def store(_context: Any, _address: Any, value: Any) -> Any:
    """Type and generate `store(address, value)`: one element."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = _pointer(builder, arguments[0], context.get_value_type(value))
        builder.store(arguments[1], pointer)
        return context.get_dummy_value()

    return types.void(types.int64, value), generate


_FRESH = {types.float64: ("=d", "f64"), types.int64: ("=l", "u64")}


def load_fresh(_context: Any, _address: Any, element: Any) -> Any:
    """Type and generate `load_fresh(address, element)`: what other blocks wrote, past the cache.

    For float64 and int64. In PTX, since llvmlite has no volatile loads.
    """
    kind = element.instance_type
    register, suffix = _FRESH[kind]

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        form = ir.FunctionType(context.get_value_type(kind), [ir.IntType(64)])
        text = f"ld.volatile.global.{suffix} $0, [$1];"
        asm = ir.InlineAsm(form, text, f"{register},l,~{{memory}}", side_effect=True)
        return builder.call(asm, arguments[:1])

    return kind(types.int64, element), generate


def float32_product(_context: Any, _first: Any, _second: Any) -> Any:
    """Type and generate `float32_product(first, second)`, rounded before anything is added to it.

    In PTX, since a plain product is fused with an addition that follows.
    """

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        kind = ir.FloatType()
        form = ir.FunctionType(kind, [kind, kind])
        return builder.call(ir.InlineAsm(form, "mul.rn.f32 $0, $1, $2;", "=f,f,f"), arguments)

    return types.float32(types.float32, types.float32), generate


def word_product_high(_context: Any, _first: Any, _second: Any) -> Any:
    """Type and generate `word_product_high(first, second)`: the upper 64 bits of 128."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(word, wide) for word in arguments))
        return builder.trunc(builder.lshr(product, wide(64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


# Vectors of narrow elements would be loaded and stored in pieces: 16 bytes are at most four words.
def _split(builder: Any, words: Any, width: int) -> list[Any]:
    parts = []
    for i in range(VECTOR_BYTES // 4):
        word = builder.extract_element(words, _WORD(i))
        for shift in range(0, 32, width):
            parts.append(builder.trunc(builder.lshr(word, _WORD(shift)), ir.IntType(width)))
    return parts


def _joined(builder: Any, parts: list[Any], width: int) -> list[Any]:
    words = []
    for first in range(0, len(parts), 32 // width):
        word = _WORD(0)
        for i in range(32 // width):
            wide = builder.zext(parts[first + i], _WORD)
            word = builder.or_(word, builder.shl(wide, _WORD(i * width)))
        words.append(word)
    return words


def load_lanes(_context: Any, _address: Any, element: Any) -> Any:
    """Type and generate `load_lanes(address, element)`: a tuple of 16 bytes, in one load."""
    kind = element.instance_type
    count = VECTOR_BYTES * 8 // kind.bitwidth
    tuple_of: Any = types.UniTuple
    signature = tuple_of(kind, count)(types.int64, element)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words = builder.load(_pointer(builder, arguments[0], _VECTOR), align=VECTOR_BYTES)
        if kind.bitwidth >= 32:
            lanes = builder.bitcast(words, ir.VectorType(context.get_value_type(kind), count))
            parts = [builder.extract_element(lanes, _WORD(i)) for i in range(count)]
        else:
            parts = _split(builder, words, kind.bitwidth)
        return context.make_tuple(builder, signature.return_type, parts)

    return signature, generate


def store_lanes(_context: Any, _address: Any, lanes: Any) -> Any:
    """Type and generate `store_lanes(address, lanes)`: a tuple of 16 bytes, in one store."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        parts = [builder.extract_value(arguments[1], i) for i in range(lanes.count)]
        if lanes.dtype.bitwidth < 32:
            parts = _joined(builder, parts, lanes.dtype.bitwidth)
        packed = ir.Constant(ir.VectorType(parts[0].type, len(parts)), ir.Undefined)
        for i, part in enumerate(parts):
            packed = builder.insert_element(packed, part, _WORD(i))
        words = builder.bitcast(packed, _VECTOR)
        builder.store(words, _pointer(builder, arguments[0], _VECTOR), align=VECTOR_BYTES)
        return context.get_dummy_value()

    return types.void(types.int64, lanes), generate


def atomic_add(_context: Any, _address: Any, value: Any) -> Any:
    """Type and generate `atomic_add(address, value)`: add an integer, return what was there."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = _pointer(builder, arguments[0], context.get_value_type(value))
        return builder.atomic_rmw("add", pointer, arguments[1], "monotonic")

    return value(types.int64, value), generate


def float32_bits(_context: Any, _value: Any) -> Any:
    """Type and generate `float32_bits(value)`: the bits as uint32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _WORD)

    return types.uint32(types.float32), generate


def float16_to_float32(_context: Any, _bits: Any) -> Any:
    """Type and generate `float16_to_float32(bits)`; exact."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


def float32_to_float16(_context: Any, _value: Any) -> Any:
    """Type and generate `float32_to_float16(value)`: to nearest, ties to even."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), _HALF_WORD)

    return types.uint16(types.float32), generate


def bfloat16_to_float32(_context: Any, _bits: Any) -> Any:
    """Type and generate `bfloat16_to_float32(bits)`; exact."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        upper = builder.shl(builder.zext(arguments[0], _WORD), _WORD(16))
        return builder.bitcast(upper, ir.FloatType())

    return types.float32(types.uint16), generate


def float32_to_bfloat16(_context: Any, _value: Any) -> Any:
    """Type and generate `float32_to_bfloat16(value)`: to nearest, ties to even; NaN stays NaN.

    By integers: sm_75 has no instruction for it.
    """

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], _WORD)
        upper = builder.lshr(bits, _WORD(16))
        odd = builder.and_(upper, _WORD(1))
        up = builder.add(bits, builder.add(odd, _WORD(0x7FFF)))
        quiet = builder.or_(upper, _WORD(0x0040))
        is_nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        result = builder.select(is_nan, quiet, builder.lshr(up, _WORD(16)))
        return builder.trunc(result, _HALF_WORD)

    return types.uint16(types.float32), generate
