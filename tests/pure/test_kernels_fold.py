"""Folding a piece of several buffers at once equals folding them one after the other."""

import ctypes
import itertools

import numpy as np
import pytest

from ringfold.kernels import reference
from ringfold.kernels.fold import fold_callback
from ringfold.kernels.operations import ALLOWED
from ringfold.kernels.records import FOLD_BLOCK, SCRATCH_BYTES, FoldWord
from ringfold.kernels.storage import FLOATS, HALVES, PARTS, STORAGE

FIRST = (*HALVES, *FLOATS, "int64", "uint8", "bool")
"""Types on which every op is compiled in each run; of the other integers, sums alone."""
PAIRS = [
    (op, dtype)
    if op == "sum" or dtype in FIRST
    else pytest.param(op, dtype, marks=pytest.mark.slow)
    for op, dtypes in ALLOWED.items()
    for dtype in dtypes
]
MEANS = [("mean", dtype) for dtype in (*HALVES, *FLOATS, *PARTS)]
SIZES = [0, 1, 3, 17, FOLD_BLOCK, FOLD_BLOCK + 5]


def buffers(dtype, num, count):
    """Finite numbers of every size; bits would be mostly NaN in the half widths."""
    generator = np.random.default_rng(num * 1000 + count)
    rows = generator.normal(0, 3, (num, count + 2))
    if dtype == "bool":
        return list(rows > 0)
    if dtype in PARTS:
        return list((rows + 1j * rows[:, ::-1]).astype(STORAGE[dtype]))
    if dtype == "bfloat16":
        return [reference.from_float32(row.astype(np.float32), dtype) for row in rows]
    return list(rows.astype(STORAGE[dtype]) if np.dtype(STORAGE[dtype]).kind in "fi"
                else np.abs(rows).astype(STORAGE[dtype]))  # fmt: skip


def fold(op, dtype, sources, targets, count, divisors, into):
    """Fold the elements [1, count + 1) of every source into those from `into` on of the targets."""
    itemsize = STORAGE[dtype].itemsize
    tables = [np.array([x.ctypes.data for x in side], np.int64) for side in (sources, targets)]
    scratch = np.zeros(SCRATCH_BYTES, np.uint8)
    record = np.zeros(FoldWord.WORDS, np.int64)
    record[: FoldWord.BEFORE] = (
        tables[0].ctypes.data, len(sources), itemsize, tables[1].ctypes.data, len(targets),
        into * itemsize, count, scratch.ctypes.data,
    )  # fmt: skip
    record.view(np.float64)[FoldWord.BEFORE :] = divisors
    ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(fold_callback(op, dtype))(record.ctypes.data)


def folded(op, dtype, sources, divisors):
    half = dtype in HALVES
    wide = [reference.to_float32(x, dtype) if half else x.copy() for x in sources]
    if op == "mean" and half:
        wide = [x / np.float32(divisors[0]) for x in wide]
    total = wide[0].copy()
    combine = reference.combine("sum" if op == "mean" else op, "float32" if half else dtype)
    for x in wide[1:]:
        combine(total, x)
    if op == "mean":
        reference.divide(total, divisors[1])
    return reference.from_float32(total, dtype) if half else total


@pytest.mark.parametrize(("op", "dtype"), PAIRS + MEANS)
@pytest.mark.parametrize("num", [1, 2, 4, 5])
def test_fold_equals_its_definition(op, dtype, num):
    divisors = (1.0, 1.0) if op != "mean" else (4.0 if dtype in HALVES else 1.0, 0.75)
    for count in SIZES:
        sources = buffers(dtype, num, 2 * count + 2)
        whole = folded(op, dtype, [x[1 : count + 1] for x in sources], divisors)
        apart = [np.zeros_like(x) for x in sources]
        before = [x.copy() for x in sources]
        chosen = [apart[:1], apart[:2], apart, [sources[-1]], sources, sources[::-1]]
        # Which target is which source decides what may be said not to overlap.
        chosen += [[sources[0], *apart[1:]], [sources[-1], *apart[1:]], [*apart[1:], sources[0]]]
        chosen += [[*sources[:-1], apart[-1]], [*apart[:-1], sources[-1]]]
        for targets, into in itertools.product(chosen, (1, count + 2)):
            for x, none, old in zip(sources, apart, before, strict=True):
                x[:], none[:] = old, 0
            wanted = [x.copy() for x in targets]
            fold(op, dtype, sources, targets, count, divisors, into)
            for x, right in zip(targets, wanted, strict=True):
                right[into : into + count] = whole
                assert x.tobytes() == right.tobytes(), (num, count, len(targets), into)
