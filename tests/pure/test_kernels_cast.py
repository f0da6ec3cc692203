"""Widening and narrowing of half-width storage: every pattern, and every kind of rounding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfold.kernels import cast, reference
from ringfold.kernels.storage import HALVES, STORAGE, change_by

PATTERNS = np.arange(1 << 16, dtype=np.uint16)


def half(bits, dtype):
    return np.ascontiguousarray(bits).view(STORAGE[dtype])


def widened(storage, dtype, module=cast):
    target = np.full(storage.size, 7.0, np.float32)
    module.widen(storage, target, dtype)
    return target


def narrowed(values, dtype, divisor=1.0, module=cast):
    target = np.full(values.size, 7, np.uint16).view(STORAGE[dtype])
    module.narrow(values, target, dtype, divisor)
    return target


def assert_same_halves(found, expected, dtype):
    """Equal bits, or NaN on both sides."""
    nan = np.isnan(reference.to_float32(found, dtype))
    np.testing.assert_array_equal(nan, np.isnan(reference.to_float32(expected, dtype)))
    np.testing.assert_array_equal(found.view(np.uint16)[~nan], expected.view(np.uint16)[~nan])


def random_patterns(num, seed):
    return np.random.default_rng(seed).integers(0, 1 << 32, num, dtype=np.uint32)


def halfway_values(dtype):
    """Every half-width value, every midpoint between two neighbours, and one step off each."""
    finite = PATTERNS[np.isfinite(reference.to_float32(half(PATTERNS, dtype), dtype))]
    values = reference.to_float32(half(finite, dtype), dtype)
    ordered = np.unique(values).astype(np.float64)
    # The step above the largest number decides what rounds to infinity.
    top = ordered[-1] + (ordered[-1] - ordered[-2]) / 2
    middles = np.append((ordered[1:] + ordered[:-1]) / 2, [top, -top]).astype(np.float32)
    marks = np.concatenate([values, middles])
    toward = [np.nextafter(marks, np.float32(end)) for end in (-np.inf, np.inf)]
    return np.concatenate([marks, *toward])


@pytest.mark.parametrize("dtype", HALVES)
def test_every_pattern_round_trips_bit_for_bit(dtype):
    every = half(PATTERNS, dtype)
    assert_same_halves(narrowed(widened(every, dtype), dtype), every, dtype)


def test_every_float16_pattern_widens_as_numpy_does():
    every = PATTERNS.view(np.float16)
    np.testing.assert_array_equal(widened(every, "float16"), every.astype(np.float32))
    zeros = widened(np.array([0x0000, 0x8000], np.uint16).view(np.float16), "float16")
    assert np.signbit(zeros).tolist() == [False, True]


@pytest.mark.parametrize("dtype", HALVES)
def test_every_pattern_widens_as_the_reference_and_torch_do(dtype):
    import torch

    every = half(PATTERNS, dtype)
    found = widened(every, dtype)
    nan = np.isnan(found)
    kind = {"float16": torch.float16, "bfloat16": torch.bfloat16}[dtype]
    from_torch = torch.from_numpy(PATTERNS.view(np.int16)).view(kind).float().numpy()
    for expected in (widened(every, dtype, reference), from_torch):
        np.testing.assert_array_equal(nan, np.isnan(expected))
        np.testing.assert_array_equal(
            found[~nan].view(np.uint32), np.ascontiguousarray(expected)[~nan].view(np.uint32)
        )


@pytest.mark.parametrize("seed", range(2))
def test_float16_rounds_as_numpy_does(seed):
    values = random_patterns(2_000_000, seed).view(np.float32)
    # Random bits seldom fall into the narrow range of float16; these nearly all do.
    near = np.exp2(np.random.default_rng(seed).uniform(-27, 17, 1_000_000)).astype(np.float32)
    for source in (values, near, -near, halfway_values("float16")):
        with np.errstate(all="ignore"):
            expected = source.astype(np.float16)
        assert_same_halves(narrowed(source, "float16"), expected, "float16")


@pytest.mark.parametrize("seed", range(2))
def test_both_halves_round_as_torch_does(seed):
    import torch

    kinds = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    for dtype, kind in kinds.items():
        for source in (random_patterns(2_000_000, seed).view(np.float32), halfway_values(dtype)):
            converted = torch.from_numpy(source).to(kind).view(torch.int16).numpy()
            expected = half(converted.view(np.uint16), dtype)
            assert_same_halves(narrowed(source, dtype), expected, dtype)


@pytest.mark.parametrize(
    ("dtype", "value", "bits"),
    [
        ("float16", 65504.0, 0x7BFF),
        ("float16", 65519.996, 0x7BFF),
        ("float16", 65520.0, 0x7C00),
        ("float16", -65520.0, 0xFC00),
        ("float16", 1e38, 0x7C00),
        ("float16", np.inf, 0x7C00),
        ("float16", 2.0**-24, 0x0001),
        ("float16", 2.0**-25, 0x0000),
        ("float16", 3 * 2.0**-25, 0x0002),
        ("float16", -(2.0**-26), 0x8000),
        ("float16", 2.0**-14, 0x0400),
        ("float16", 2.0**-14 - 2.0**-26, 0x0400),
        ("float16", 1 + 2.0**-11, 0x3C00),
        ("float16", 1 + 3 * 2.0**-11, 0x3C02),
        ("bfloat16", 3.3895314e38, 0x7F7F),
        ("bfloat16", 3.4028235e38, 0x7F80),
        ("bfloat16", 2.0**-149, 0x0000),
        ("bfloat16", 2.0**-133, 0x0001),
        ("bfloat16", -0.0, 0x8000),
        ("bfloat16", 1 + 2.0**-8, 0x3F80),
        ("bfloat16", 1 + 3 * 2.0**-8, 0x3F82),
    ],
)
def test_known_roundings(dtype, value, bits):
    for module in (cast, reference):
        found = narrowed(np.array([value], np.float32), dtype, module=module)
        assert found.view(np.uint16).tolist() == [bits]


@pytest.mark.parametrize("dtype", HALVES)
def test_nan_with_a_payload_only_in_the_lost_bits_stays_nan(dtype):
    patterns = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32)
    values = widened(narrowed(patterns.view(np.float32), dtype), dtype)
    assert np.isnan(values).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("divisor", [1.0, 2.0, 3.0, 7.0, 1024.0, -0.3])
def test_division_is_in_float32_before_rounding(dtype, divisor):
    source = np.concatenate(
        [random_patterns(100_001, 3).view(np.float32), halfway_values(dtype)[::7]]
    )
    with np.errstate(all="ignore"):
        quotient = source / np.float32(divisor)
    expected = reference.from_float32(quotient, dtype)
    assert_same_halves(narrowed(source, dtype, divisor), expected, dtype)
    assert_same_halves(narrowed(source, dtype, divisor, reference), expected, dtype)


def test_a_mean_of_float16_neither_overflows_nor_vanishes():
    """Four ranks hold 40000, or two hold 2**-24: dividing in float16 fails before or after."""
    assert narrowed(np.array([160000.0], np.float32), "float16", 4.0).tolist() == [40000.0]
    assert narrowed(np.array([2.0**-23], np.float32), "float16", 2.0).tolist() == [2.0**-24]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [0, 1, 2, 3, 15, 16, 17, 31, 33, 1025])
def test_sizes_around_a_vector_leave_the_neighbours_alone(dtype, size):
    values = np.arange(1, size + 1, dtype=np.float32) / 8
    room = np.full(size + 2, 0x1234, np.uint16).view(STORAGE[dtype])
    cast.narrow(values, room[1:-1], dtype)
    assert room.view(np.uint16)[[0, -1]].tolist() == [0x1234, 0x1234]
    back = np.full(size + 2, 99.0, np.float32)
    cast.widen(room[1:-1], back[1:-1], dtype)
    assert back[[0, -1]].tolist() == [99.0, 99.0]
    assert_same_halves(room[1:-1], reference.from_float32(values, dtype), dtype)
    np.testing.assert_array_equal(back[1:-1], reference.to_float32(room[1:-1], dtype))


@pytest.mark.parametrize("module", [cast, reference])
def test_bad_arguments_are_refused_with_what_came(module):
    singles, halves = np.zeros(4, np.float32), np.zeros(4, np.uint16)
    with pytest.raises(TypeError, match="'float32' is not one of float16, bfloat16"):
        module.widen(halves, singles, "float32")
    with pytest.raises(TypeError, match="source: expected float16 storage for float16, got uint16"):
        module.widen(halves, singles, "float16")
    with pytest.raises(ValueError, match="source has 3 elements and target has 4"):
        module.widen(halves[:3], singles, "bfloat16")
    with pytest.raises(ValueError, match="source has 4 elements and target has 3"):
        module.narrow(singles, halves[:3], "bfloat16")
    with pytest.raises(ValueError, match=r"source: expected a contiguous 1-d array, .* \(8,\)"):
        module.narrow(np.zeros(8, np.float32)[::2], halves, "bfloat16")
    with pytest.raises(ValueError, match="divisor is 0"):
        module.narrow(singles, halves, "bfloat16", 0.0)
    frozen = np.zeros(4, np.uint16)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="target: the array is read-only"):
        module.narrow(singles, frozen, "bfloat16")
    module.widen(frozen, singles, "bfloat16")


@given(st.floats(width=32), st.integers(-16, 16))
def test_a_power_of_two_divides_by_its_reciprocal(value: float, exponent: int) -> None:
    change, factor = change_by(2.0**exponent)
    assert change == "multiply"
    with np.errstate(over="ignore"):
        quotient = np.float32(value) / np.float32(2.0**exponent)
        product = np.float32(value) * np.float32(factor)
    assert quotient.tobytes() == product.tobytes() or np.isnan(value)


def test_other_divisors_divide() -> None:
    assert change_by(3.0) == ("divide", 3.0) and change_by(2.0**120)[0] == "divide"
    assert change_by(-4.0) == ("multiply", -0.25)
