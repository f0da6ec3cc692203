"""Calls as numbers, which compiled code can compare."""

from __future__ import annotations

import functools

from . import fused
from .dtypes import DTYPES, OPS

_OPS = ("", *OPS)


@functools.cache
def code_of(name: str, op: str, dtype: str) -> int:
    """Return a number for a call that ranks can compare."""
    names = (*fused.NAMES, "")
    return (names.index(name) * 8 + _OPS.index(op)) * 64 + list(DTYPES).index(dtype)


def describe_code(code: int) -> str:
    """Return the text of a `code_of`."""
    name = (*fused.NAMES, "")[code // 512]
    op = _OPS[code // 64 % 8]
    return f"{name}({op + ', ' if op else ''}{list(DTYPES)[code % 64]})"
