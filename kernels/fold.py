"""Fold the same piece of several ranks' buffers in one pass, and write the result to some of them.

Where all ranks map each other's memory, a reduction needs no messages: each rank folds its own part
of everybody's buffers. The order is that of the ranks, so the result does not depend on who folds.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba.np.numpy_support import carray

from .compiled import compile_callback
from .elements import ELEMENTS
from .operations import check_operation
from .records import FOLD_BLOCK, FoldWord
from .reduce import OPS
from .scalars import divide, keep, pointer_to
from .storage import FLOATS, HALVES, PARTS, STORAGE

_SOURCES, _NUM_SOURCES, _FROM = map(int, (FoldWord.SOURCES, FoldWord.NUM_SOURCES, FoldWord.FROM))
_TARGETS, _NUM_TARGETS, _INTO = map(int, (FoldWord.TARGETS, FoldWord.NUM_TARGETS, FoldWord.INTO))
_COUNT, _SCRATCH = int(FoldWord.COUNT), int(FoldWord.SCRATCH)
_BEFORE, _AFTER, _WORDS = map(int, (FoldWord.BEFORE, FoldWord.AFTER, FoldWord.WORDS))


@functools.cache
def fold_callback(op: str, dtype: str) -> int:
    """Return the address of a C function int64 f(int64 record): fold one piece of several buffers.

    The record is that of `records.FoldWord`. Half widths are folded in float32 and rounded once.

    Raises: TypeError where the op is not allowed for the dtype.
    """
    mean = op == "mean"
    name = "sum" if mean else op
    check_operation(name, dtype, among=(*HALVES, *FLOATS, *PARTS) if mean else tuple(STORAGE))
    element = ELEMENTS[dtype]
    stored, widen, narrow = element.scalar, element.widen, element.narrow
    scalars, itemsize = element.scalars, np.dtype(stored).itemsize
    wide = np.float32 if dtype in HALVES else element.scalar
    operation = OPS[dtype][name]
    before = divide if mean and dtype in HALVES else keep
    after = divide if mean else keep

    def fold(record: Any) -> Any:
        words = carray(pointer_to(record, np.int64), _WORDS)
        factors = carray(pointer_to(record, np.float64), _WORDS)
        sources = carray(pointer_to(words[_SOURCES], np.int64), words[_NUM_SOURCES])
        targets = carray(pointer_to(words[_TARGETS], np.int64), words[_NUM_TARGETS])
        first, last = wide(factors[_BEFORE]), wide(factors[_AFTER])
        count, skip, into = words[_COUNT] * scalars, words[_FROM], words[_INTO]
        if sources.size == 2 and targets.size <= 2:
            a = carray(pointer_to(sources[0] + skip, stored), count)
            b = carray(pointer_to(sources[1] + skip, stored), count)
            inside = targets[0] + into == sources[0] + skip
            if targets.size == 2 and inside and targets[1] + into == sources[1] + skip:
                for i in range(count):
                    value = operation(before(widen(a[i]), first), before(widen(b[i]), first))
                    result = stored(narrow(after(value, last)))
                    a[i] = result
                    b[i] = result
                return 0
            # Loops over arrays that overlap are not vectorised, so each case says what is what.
            if targets.size == 1 and inside:
                for i in range(count):
                    value = operation(before(widen(a[i]), first), before(widen(b[i]), first))
                    a[i] = stored(narrow(after(value, last)))
                return 0
            if targets.size == 1 and targets[0] + into == sources[1] + skip:
                for i in range(count):
                    value = operation(before(widen(a[i]), first), before(widen(b[i]), first))
                    b[i] = stored(narrow(after(value, last)))
                return 0
            if targets.size == 2 and inside:
                c = carray(pointer_to(targets[1] + into, stored), count)
                for i in range(count):
                    value = operation(before(widen(a[i]), first), before(widen(b[i]), first))
                    result = stored(narrow(after(value, last)))
                    a[i] = result
                    c[i] = result
                return 0
            if targets.size == 2 and targets[0] + into == sources[1] + skip:
                c = carray(pointer_to(targets[1] + into, stored), count)
                for i in range(count):
                    value = operation(before(widen(a[i]), first), before(widen(b[i]), first))
                    result = stored(narrow(after(value, last)))
                    b[i] = result
                    c[i] = result
                return 0
            if targets.size == 1:
                c = carray(pointer_to(targets[0] + into, stored), count)
                for i in range(count):
                    value = operation(before(widen(a[i]), first), before(widen(b[i]), first))
                    c[i] = stored(narrow(after(value, last)))
                return 0
        if sources.size == 4 and targets.size == 4:
            a = carray(pointer_to(sources[0] + skip, stored), count)
            b = carray(pointer_to(sources[1] + skip, stored), count)
            c = carray(pointer_to(sources[2] + skip, stored), count)
            d = carray(pointer_to(sources[3] + skip, stored), count)
            inside = True
            for r in range(4):
                inside = inside and targets[r] + into == sources[r] + skip
            if inside:
                for i in range(count):
                    value = operation(before(widen(a[i]), first), before(widen(b[i]), first))
                    value = operation(value, before(widen(c[i]), first))
                    value = operation(value, before(widen(d[i]), first))
                    result = stored(narrow(after(value, last)))
                    a[i] = result
                    b[i] = result
                    c[i] = result
                    d[i] = result
                return 0
        total = carray(pointer_to(words[_SCRATCH], wide), FOLD_BLOCK)
        for low in range(0, count, FOLD_BLOCK):
            length = min(FOLD_BLOCK, count - low)
            shift = low * itemsize
            part = total[:length]
            a = carray(pointer_to(sources[0] + skip + shift, stored), length)
            for i in range(length):
                part[i] = before(widen(a[i]), first)
            for r in range(1, sources.size):
                b = carray(pointer_to(sources[r] + skip + shift, stored), length)
                for i in range(length):
                    part[i] = operation(part[i], before(widen(b[i]), first))
            for r in range(targets.size):
                c = carray(pointer_to(targets[r] + into + shift, stored), length)
                for i in range(length):
                    c[i] = stored(narrow(after(part[i], last)))
        return 0

    return compile_callback(f"fold_{op}_{dtype}", fold)
