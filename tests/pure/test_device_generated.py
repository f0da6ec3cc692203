"""The instructions that device kernels are made of, compiled for the host: no GPU needed.

The simulator runs stand-ins for them, so here the generated code itself meets the reference.
"""

import numba
import numpy as np
import pytest
from numba.extending import intrinsic

from ringfold.kernels import reference
from ringfold.kernels.device import generated
from ringfold.kernels.storage import HALVES, STORAGE

PATTERNS = np.arange(1 << 16, dtype=np.uint16)


def over(function, result):
    one = intrinsic(function)

    @numba.njit
    def loop(source, target):
        for i in range(source.size):
            target[i] = one(source[i])

    return lambda source: (target := np.empty(source.size, result), loop(source, target))[0]


def same(first, second):
    return (first.view(f"u{first.itemsize}") == second.view(f"u{second.itemsize}")) | (
        np.isnan(first) & np.isnan(second)
    )


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_width_value_widens_as_in_the_reference(dtype):
    wide = over(getattr(generated, f"{dtype}_to_float32"), np.float32)(PATTERNS)
    assert same(wide, reference.to_float32(PATTERNS.view(STORAGE[dtype]), dtype)).all()


def near_every_half(dtype):
    """Every half-width value, the midpoints between them, and the float32 next to each."""
    values = reference.to_float32(PATTERNS.view(STORAGE[dtype]), dtype)
    bits = values.view(np.uint32)
    half_unit = np.uint32(1 << (12 if dtype == "float16" else 15))
    middles = (bits.astype(np.uint64) + half_unit).astype(np.uint32)
    rng = np.random.default_rng(5)
    noise = rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint64).astype(np.uint32)
    return np.concatenate(
        [bits, bits + 1, bits - 1, middles, middles + 1, middles - 1, noise]
    ).view(np.float32)


@pytest.mark.parametrize("dtype", HALVES)
def test_values_around_every_half_narrow_as_in_the_reference(dtype):
    values = near_every_half(dtype)
    narrow = over(getattr(generated, f"float32_to_{dtype}"), np.uint16)(values)
    expected = reference.from_float32(values, dtype)
    ours, theirs = (
        reference.to_float32(bits.view(STORAGE[dtype]), dtype)
        for bits in (narrow, expected.view(np.uint16))
    )
    assert same(ours, theirs).all()


def test_bits_are_the_floats_own():
    values = np.array([0.0, -0.0, 1.5, -np.inf, np.nan], np.float32)
    assert (over(generated.float32_bits, np.uint32)(values) == values.view(np.uint32)).all()


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.uint32, np.float32, np.float64])
def test_lanes_are_sixteen_bytes_in_order(kind):
    load, store = intrinsic(generated.load_lanes), intrinsic(generated.store_lanes)
    count = 16 // np.dtype(kind).itemsize

    @numba.njit
    def copy(source, target):
        lanes = load(source, kind)
        store(target, lanes)
        return lanes

    raw = np.frombuffer(np.random.default_rng(count).bytes(16 * 5), np.uint8).copy()
    start = -raw.ctypes.data % 16
    source, target = raw[start : start + 16], raw[start + 32 : start + 48]
    before = raw.copy()
    lanes = copy(source.ctypes.data, target.ctypes.data)
    assert np.array(lanes, kind).tobytes() == source.tobytes() == target.tobytes()
    before[start + 32 : start + 48] = source
    assert (raw == before).all()


def test_one_element_and_an_addition_by_address():
    load, store = intrinsic(generated.load), intrinsic(generated.store)
    add = intrinsic(generated.atomic_add)

    @numba.njit
    def work(cells):
        store(cells + 8, load(cells, np.int64) + 1)
        return add(cells + 16, np.int64(5))

    cells = np.array([41, 0, 2, 3], np.int64)
    assert work(cells.ctypes.data) == 2
    assert cells.tolist() == [41, 42, 7, 3]


def test_the_upper_half_of_a_product():
    rng = np.random.default_rng(6)
    words = rng.integers(0, 1 << 64, 1000, np.uint64, endpoint=False)
    words[:3] = 0, 1, (1 << 64) - 1
    one = intrinsic(generated.word_product_high)

    @numba.njit
    def loop(words, target):
        for i in range(words.size):
            target[i] = one(words[i], words[-1 - i])

    target = np.empty_like(words)
    loop(words, target)
    wanted = [int(a) * int(b) >> 64 for a, b in zip(words, words[::-1], strict=True)]
    assert target.tolist() == wanted
