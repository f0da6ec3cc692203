"""Folding one array into another: every op on every dtype against NumPy, to the last bit."""

import threading

import numpy as np
import pytest

from ringfold.kernels import compiled, reduce, reference
from ringfold.kernels.operations import ALLOWED
from ringfold.kernels.storage import FLOATS, HALVES, PARTS, STORAGE, parts

PAIRS = [(op, dtype) for op, dtypes in ALLOWED.items() for dtype in dtypes]
SIZES = [0, 1, 2, 3, 7, 16, 31, 33, 1025]


def random_storage(dtype, size, seed):
    """Random bits: for floats that includes subnormals, infinities and NaN."""
    kind = STORAGE[dtype]
    if dtype == "bool":
        return np.random.default_rng(seed).integers(0, 2, size).astype(bool)
    return np.frombuffer(np.random.default_rng(seed).bytes(size * kind.itemsize), dtype=kind).copy()


def special_floats(dtype):
    """Every ordered pair of the numbers that arithmetic treats in a way of their own."""
    some = [0.0, 1.0, 1.5, 65504.0, 1e-40, 6e-8, 3.4e38, np.inf]
    values = np.array([*some, *(-x for x in some), np.nan], np.float64)
    first, second = (side.ravel() for side in np.meshgrid(values, values))
    with np.errstate(all="ignore"):
        if dtype == "float64":
            return first.copy(), second.copy()
        return tuple(
            reference.from_float32(side.astype(np.float32), dtype) for side in (first, second)
        )


def assert_same(found, expected, dtype):
    """Equal bits, or NaN on both sides."""
    if dtype in PARTS:
        found, expected, dtype = parts(found), parts(expected), PARTS[dtype]
    if dtype in (*HALVES, *FLOATS):
        wide = [
            x if dtype == "float64" else reference.to_float32(x, dtype) for x in (found, expected)
        ]
        nan = np.isnan(wide[0])
        np.testing.assert_array_equal(nan, np.isnan(wide[1]))
        found, expected = found[~nan], expected[~nan]
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("op", "dtype"), PAIRS)
def test_combine_equals_its_definition(op, dtype):
    fold, define = reduce.combine(op, dtype), reference.combine(op, dtype)
    inputs = [
        (random_storage(dtype, n, n), random_storage(dtype, n, n + 1)) for n in (*SIZES, 50021)
    ]
    if dtype in (*HALVES, *FLOATS):
        inputs.append(special_floats(dtype))
    for target, incoming in inputs:
        before, expected = incoming.copy(), target.copy()
        define(expected, incoming)
        fold(target, incoming)
        assert_same(target, expected, dtype)
        assert incoming.tobytes() == before.tobytes()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("op", ALLOWED)
def test_accumulate_equals_its_definition(op, dtype):
    fold, define = reduce.accumulate(op, dtype), reference.accumulate(op, dtype)
    for size in (*SIZES, 50021):
        target = random_storage("float32", size, size)
        incoming = random_storage(dtype, size, size + 1)
        expected = target.copy()
        define(expected, incoming)
        fold(target, incoming)
        assert_same(target, expected, "float32")


@pytest.mark.parametrize("dtype", (*FLOATS, *PARTS))
@pytest.mark.parametrize("divisor", [1.0, 2.0, 3.0, 7.0, -0.1, np.inf])
def test_divide_is_true_division(dtype, divisor):
    for size in (*SIZES, 50021):
        target = random_storage(dtype, size, size)
        expected = target.copy()
        reference.divide(expected, divisor)
        reduce.divide(target, divisor)
        assert_same(target, expected, dtype)


@pytest.mark.parametrize(("op", "dtype"), PAIRS)
def test_neighbours_of_the_target_are_left_alone(op, dtype):
    room = random_storage(dtype, 21, 1)
    before = room.copy()
    reduce.combine(op, dtype)(room[3:18], random_storage(dtype, 15, 2))
    assert room[:3].tobytes() == before[:3].tobytes()
    assert room[18:].tobytes() == before[18:].tobytes()


@pytest.mark.parametrize("module", [reduce, reference])
def test_known_values(module):
    def folded(op, dtype, first, second):
        kind = STORAGE[dtype]
        target = np.array(first, kind)
        module.combine(op, dtype)(target, np.array(second, kind))
        return target.tolist()

    assert folded("sum", "uint8", [250, 1], [10, 2]) == [4, 3]
    assert folded("prod", "int8", [127, -128], [2, -1]) == [-2, -128]
    assert folded("sum", "int64", [2**63 - 1], [1]) == [-(2**63)]
    assert folded("max", "uint64", [2**63], [2**63 - 1]) == [2**63]
    assert folded("min", "int32", [-5, 5], [3, -3]) == [-5, -3]
    assert folded("min", "bool", [True, True, False], [True, False, False]) == [True, False, False]
    assert folded("max", "bool", [True, False, False], [True, True, False]) == [True, True, False]
    # 2048 + 1 + 1 in float16: each addition alone is rounded away.
    assert folded("sum", "float16", [2048.0], [1.0]) == [2048.0]
    assert folded("sum", "float16", [65504.0], [65504.0]) == [np.inf]
    # bfloat16 1.0 + 2.0**-8 is halfway between two neighbours and goes to the even one.
    assert folded("sum", "bfloat16", [0x3F80, 0x3F81], [0x3B80, 0x3B80]) == [0x3F80, 0x3F82]


def test_a_wide_accumulator_keeps_what_a_half_loses():
    target = np.array([2048.0], np.float32)
    ones = np.ones(1, np.float16)
    for _ in range(3):
        reduce.accumulate("sum", "float16")(target, ones)
    assert target.tolist() == [2051.0]


@pytest.mark.parametrize("dtype", FLOATS)
def test_min_and_max_do_not_depend_on_the_order_of_the_ranks(dtype):
    """A tie between zeros of two signs, or NaN on one side, gives the same either way round."""
    first, second = special_floats(dtype)
    for op in ("min", "max"):
        one, other = first.copy(), second.copy()
        reduce.combine(op, dtype)(one, second)
        reduce.combine(op, dtype)(other, first)
        assert_same(one, other, dtype)
    zeros = np.array([0.0, -0.0], dtype)
    for op, negative in (("min", True), ("max", False)):
        target = zeros.copy()
        reduce.combine(op, dtype)(target, -zeros)
        assert np.signbit(target).tolist() == [negative, negative]


@pytest.mark.parametrize("module", [reduce, reference])
def test_an_undefined_pair_names_both_and_lists_what_is_allowed(module):
    with pytest.raises(
        TypeError,
        match=r"op 'sum' on dtype 'bool': expected dtype .*float16.*uint64, complex64",
    ):
        module.combine("sum", "bool")
    with pytest.raises(TypeError, match=r"op 'mean' on dtype 'float32': .* sum, prod, min, max$"):
        module.combine("mean", "float32")
    with pytest.raises(TypeError, match="'complex64'"):
        module.combine("prod", "complex64")
    with pytest.raises(
        TypeError, match=r"'float32': expected dtype to be one of float16, bfloat16$"
    ):
        module.accumulate("sum", "float32")
    with pytest.raises(TypeError, match="'int32' is not one of float32, float64"):
        module.divide(np.ones(2, np.int32), 2.0)
    with pytest.raises(ValueError, match="divisor is 0"):
        module.divide(np.ones(2, np.float32), 0.0)
    frozen = np.ones(2, np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        module.divide(frozen, 2.0)


@pytest.mark.parametrize("module", [reduce, reference])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_sizes_that_differ_are_refused_before_anything_is_read(module, dtype):
    target = np.ones(3, dtype)
    with pytest.raises(ValueError, match="target"):
        module.combine("sum", dtype)(target, np.ones(2, dtype))
    assert target.tolist() == [1.0, 1.0, 1.0]


def test_a_kernel_refuses_arrays_it_was_not_compiled_for():
    fold = reduce.combine("sum", "float32")
    target = np.ones(4, np.float32)
    for wrong in (np.ones(4), np.ones(8, np.float32)[::2], np.ones((2, 2), np.float32)):
        with pytest.raises(TypeError):
            fold(target, wrong)
    frozen = np.ones(4, np.float32)
    frozen.flags.writeable = False
    with pytest.raises(TypeError):
        fold(frozen, target)
    fold(target, frozen)
    assert target.tolist() == [2.0] * 4


def test_the_same_pair_is_compiled_once():
    assert reduce.combine_kernel("sum", "float32") is reduce.combine_kernel("sum", "float32")


def test_every_variant_has_a_cache_name_of_its_own():
    """Two ranks that compile variants under one name can swap each other's cached code."""
    kernels = [reduce.combine_kernel(op, dtype) for op, dtype in PAIRS]
    kernels += [reduce.accumulate_kernel(op, dtype) for op in ALLOWED for dtype in HALVES]
    assert len({kernel.py_func.__qualname__ for kernel in kernels}) == len(kernels)
    assert all(len(kernel.signatures) == 1 for kernel in kernels)


def test_where_no_cache_can_be_written_the_kernel_still_compiles():
    import numba

    scope = {}
    exec("def double(target):\n    for i in range(target.size):\n        target[i] *= 2\n", scope)
    kernel = compiled.compile_kernel("double", scope["double"], compiled.flat(numba.int32))
    target = np.array([1, 2, 3], np.int32)
    kernel(target)
    assert target.tolist() == [2, 4, 6]


def test_two_threads_fold_side_by_side():
    """The lock of the interpreter is released, and nothing is shared between calls."""
    fold = reduce.combine("sum", "float64")
    targets = [np.full(10_007, float(rank)) for rank in range(2)]
    incoming = [np.arange(10_007.0) + rank for rank in range(2)]

    def work(rank):
        for _ in range(50):
            fold(targets[rank], incoming[rank])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(2):
        np.testing.assert_array_equal(targets[rank], rank + 50 * incoming[rank])
