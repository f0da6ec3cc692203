"""Calls from compiled code to C functions whose addresses come as int64.

Addresses are arguments, so that nothing of one process gets into code kept on disk. A handle is
passed as 64 bits: MPI libraries whose handles are 32-bit integers read the lower half, which the
calling conventions of 64-bit processors allow for a sign-extended value.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from .scalars import builtin

_INT = ir.IntType(32)
_WORD = ir.IntType(64)


def _call(builder: Any, arguments: Any, kinds: tuple[Any, ...]) -> Any:
    """Call arguments[0] with the others cut to `kinds`; return its int."""
    kind = ir.FunctionType(_INT, list(kinds))
    function = builder.inttoptr(arguments[0], kind.as_pointer())
    values = [
        builder.trunc(value, wanted) if wanted is _INT else value
        for value, wanted in zip(arguments[1:], kinds, strict=True)
    ]
    return builder.sext(builder.call(function, values), _WORD)


@builtin
def call_post(
    _context: Any,
    function: Any,
    memory: Any,
    count: Any,
    datatype: Any,
    peer: Any,
    tag: Any,
    comm: Any,
    request: Any,
) -> Any:
    """Call MPI_Isend or MPI_Irecv, MPI 4.1 section 3.7.2."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _call(builder, arguments, (_WORD, _INT, _WORD, _INT, _INT, _WORD, _WORD))

    return types.int64(*[types.int64] * 8), generate


@builtin
def call_test(_context: Any, function: Any, request: Any, flag: Any, status: Any) -> Any:
    """Call MPI_Test, MPI 4.1 section 3.7.3; all arguments are addresses."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _call(builder, arguments, (_WORD, _WORD, _WORD))

    return types.int64(*[types.int64] * 4), generate


@builtin
def call_get_count(_context: Any, function: Any, status: Any, datatype: Any, count: Any) -> Any:
    """Call MPI_Get_count, MPI 4.1 section 3.2.5; status and count are addresses."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _call(builder, arguments, (_WORD, _WORD, _WORD))

    return types.int64(*[types.int64] * 4), generate
