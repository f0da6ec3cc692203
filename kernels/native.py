"""What compiled code needs to meet other processes in shared memory: addresses, atomics, copies.

An address is an int64. Loads acquire and stores release, so what a rank wrote before it stored is
seen by whoever loads that value (C11 memory model, sections 7.17.3 and 5.1.2.4).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils as untyped
from numba.np.numpy_support import carray

from .scalars import builtin, compiled, pointer_to

cgutils: Any = untyped
_WORD = ir.IntType(64)


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _WORD.as_pointer())


@compiled
def words_at(address: Any, count: Any) -> Any:
    """Return the int64 words from an address on as an array."""
    return carray(pointer_to(address, np.int64), count)


@builtin
def load(_context: Any, address: Any) -> Any:
    """Return the int64 at an address; nothing after it is done before."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_pointer(builder, arguments[0]), "acquire", 8)

    return types.int64(types.int64), generate


@builtin
def store(_context: Any, address: Any, value: Any) -> Any:
    """Store an int64 at an address; nothing before it is done after."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[1], _pointer(builder, arguments[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@builtin
def try_lock(_context: Any, address: Any) -> Any:
    """Turn the int64 at an address from 0 to 1, and tell whether it was 0."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _exchanged(builder, arguments[0], _WORD(0), _WORD(1))

    return types.int64(types.int64), generate


@builtin
def compare_exchange(_context: Any, address: Any, before: Any, after: Any) -> Any:
    """Turn the int64 at an address from one value to another, and tell whether it was the first."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _exchanged(builder, *arguments)

    return types.int64(types.int64, types.int64, types.int64), generate


def _exchanged(builder: Any, address: Any, before: Any, after: Any) -> Any:
    found = builder.cmpxchg(_pointer(builder, address), before, after, "acquire", "monotonic")
    return builder.zext(builder.extract_value(found, 1), _WORD)


@builtin
def copy_bytes(_context: Any, target: Any, source: Any, nbytes: Any) -> Any:
    """Copy bytes between addresses that do not overlap."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        target, source = (builder.inttoptr(address, byte) for address in arguments[:2])
        cgutils.raw_memcpy(builder, target, source, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@builtin
def call(_context: Any, function: Any, first: Any) -> Any:
    """Call the C function int64 f(int64) at an address."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(_WORD, [_WORD])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])

    return types.int64(types.int64, types.int64), generate


@builtin
def fence(_context: Any) -> Any:
    """Let nothing that follows be done before what precedes, a load after a store included."""

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@builtin
def system_call(
    _context: Any, function: Any, number: Any, first: Any, second: Any, third: Any, fourth: Any
) -> Any:
    """Call syscall(2), whose address is given, with four arguments."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(_WORD, [_WORD] * 5)
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])

    return types.int64(*[types.int64] * 6), generate


@builtin
def access_process(
    _context: Any, function: Any, process: Any, own: Any, remote: Any, nbytes: Any
) -> Any:
    """Copy between own and another process's memory by process_vm_readv(2) or process_vm_writev.

    function: address of the one or the other.

    Returns: how many were copied, which may be fewer than asked for; -1 where none could be.
    """

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        function, process, own, remote, nbytes = arguments
        both = ir.ArrayType(_WORD, 2)
        vectors = []
        for address in (own, remote):
            vector = cgutils.alloca_once(builder, both)
            for word, value in enumerate((address, nbytes)):
                builder.store(value, cgutils.gep_inbounds(builder, vector, 0, word))
            vectors.append(vector)
        number = ir.IntType(32)
        kinds = [number, both.as_pointer(), _WORD, both.as_pointer(), _WORD, _WORD]
        kind = ir.FunctionType(_WORD, kinds)
        here, there = vectors
        given = [builder.trunc(process, number), here, _WORD(1), there, _WORD(1), _WORD(0)]
        return builder.call(builder.inttoptr(function, kind.as_pointer()), given)

    return types.int64(*[types.int64] * 5), generate


@builtin
def nanoseconds(_context: Any, function: Any, clock: Any) -> Any:
    """Return the time of a clock, given the address of clock_gettime."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        both = ir.ArrayType(_WORD, 2)
        time = cgutils.alloca_once(builder, both)
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(32), both.as_pointer()])
        which = builder.trunc(arguments[1], ir.IntType(32))
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [which, time])
        seconds, rest = (builder.extract_value(builder.load(time), part) for part in (0, 1))
        return builder.add(builder.mul(seconds, _WORD(1_000_000_000)), rest)

    return types.int64(types.int64, types.int64), generate


@builtin
def relax(_context: Any) -> Any:
    """Tell the processor that this is a loop that waits; does nothing where it has no such hint."""

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        if _is_x86(builder.module.triple):
            kind = ir.FunctionType(ir.VoidType(), [])
            pause = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause")
            builder.call(pause, [])
        return context.get_dummy_value()

    return types.void(), generate


def _is_x86(triple: str) -> bool:
    return triple.startswith(("x86_64", "i686", "amd64"))
