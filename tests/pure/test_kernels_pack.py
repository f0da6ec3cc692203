"""Many tensors to one bucket and back: values, by-products, and everything that is refused."""

import gc
import itertools

import numpy as np
import pytest

from ringfold.kernels import pack as packing
from ringfold.kernels import reference
from ringfold.kernels.pack import Packed, PointerTable, pack, unpack
from ringfold.kernels.storage import HALVES, STORAGE
from ringfold.kernels.table import PAIRS

LAYOUTS = [[], [0], [0, 0], [0, 3], [1], [127], [128], [129], [1025], [3, 0, 130, 1], [5] * 40]
DTYPES = [(tensor, bucket) for tensor, buckets in PAIRS.items() for bucket in buckets]
GUARD = 3


def stored(values, dtype):
    if dtype == "float64":
        return np.array(values, np.float64)
    return reference.from_float32(np.array(values, np.float32), dtype)


def numbers(storage, dtype):
    return storage if dtype == "float64" else reference.to_float32(storage, dtype)


def ramps(counts, dtype, step=1.0):
    """Tensors through which the values step, 2 step, 3 step, ... run."""
    starts = [0, *itertools.accumulate(counts)]
    return [
        stored(step * np.arange(start + 1, start + count + 1), dtype)
        for start, count in zip(starts, counts, strict=False)
    ]


def noise(counts, dtype, seed):
    rng = np.random.default_rng(seed)
    return [
        stored(rng.standard_normal(n) * np.exp2(rng.integers(-20, 12, n)), dtype) for n in counts
    ]


def guarded_bucket(num, dtype):
    return stored(np.full(num + 2 * GUARD, 0.625), dtype)


def assert_guards(room, dtype):
    inside = slice(GUARD, room.size - GUARD)
    outside = np.delete(np.arange(room.size), np.arange(room.size)[inside])
    np.testing.assert_array_equal(numbers(room[outside], dtype), 0.625)


def close(found, expected, num_elements):
    tolerance = reference.norm_tolerance(num_elements)
    return found == pytest.approx(expected, rel=tolerance, abs=0.0)


@pytest.mark.parametrize("counts", LAYOUTS, ids=str)
@pytest.mark.parametrize(("tensor", "bucket"), DTYPES)
def test_unpack_undoes_pack_and_guards_are_untouched(counts, tensor, bucket):
    tensors = ramps(counts, tensor)
    room = guarded_bucket(sum(counts), bucket)
    flat = room[GUARD : room.size - GUARD]
    pack(PointerTable.of(tensors), tensor, flat, bucket)
    rooms = [guarded_bucket(count, tensor) for count in counts]
    results = [room[GUARD : room.size - GUARD] for room in rooms]
    unpack(PointerTable.of(results), tensor, flat, bucket)
    narrowest = bucket if STORAGE[bucket].itemsize < STORAGE[tensor].itemsize else tensor
    for before, after in zip(tensors, results, strict=True):
        through = stored(numbers(before, tensor), narrowest)
        np.testing.assert_array_equal(numbers(after, tensor), numbers(through, narrowest))
    assert_guards(room, bucket)
    for guarded in rooms:
        assert_guards(guarded, tensor)


@pytest.mark.parametrize("counts", LAYOUTS, ids=str)
def test_scale_halves_and_divisor_doubles_exactly(counts):
    tensors = ramps(counts, "float32")
    flat = np.empty(sum(counts), np.float32)
    pack(PointerTable.of(tensors), "float32", flat, "float32", 0.5)
    np.testing.assert_array_equal(flat, 0.5 * np.arange(1, flat.size + 1))
    results = [np.empty_like(tensor) for tensor in tensors]
    unpack(PointerTable.of(results), "float32", flat, "float32", 0.5)
    for before, after in zip(tensors, results, strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("factor", [1.0, 0.5, 1 / 3, -7.0])
@pytest.mark.parametrize(("tensor", "bucket"), DTYPES)
def test_both_ways_equal_their_definition(tensor, bucket, factor):
    counts = [0, 1, 2, 3, 64, 0, 4099, 17]
    table = PointerTable.of(noise(counts, tensor, seed=1))
    flat, expected = (guarded_bucket(sum(counts), bucket) for _ in range(2))
    found = pack(table, tensor, flat, bucket, factor)
    defined = reference.pack(table, tensor, expected, bucket, factor)
    assert flat.tobytes() == expected.tobytes()
    assert found.finite is defined.finite
    assert close(found.square_norm, defined.square_norm, sum(counts))

    one, other = ([np.empty(n, STORAGE[tensor]) for n in counts] for _ in range(2))
    found = unpack(PointerTable.of(one), tensor, flat, bucket, factor)
    defined = reference.unpack(PointerTable.of(other), tensor, flat, bucket, factor)
    for left, right in zip(one, other, strict=True):
        assert left.tobytes() == right.tobytes()
    assert found.finite is defined.finite
    assert close(found.square_norm, defined.square_norm, sum(counts))


def test_norm_is_of_the_scaled_values_before_they_are_narrowed():
    tensor = np.array([3.0, 1 + 2.0**-12], np.float32)
    flat = np.empty(2, np.float16)
    found = pack(PointerTable.of([tensor]), "float32", flat, "float16", 2.0)
    assert flat.tolist() == [6.0, 2.0]
    assert found == Packed(True, 36.0 + (2 + 2.0**-11) ** 2)


def test_norm_is_added_in_float64():
    """In float32 the square of 1e30 is infinite, and 2**24 ones after 2**24 would all be lost."""
    flat = np.empty(2, np.float32)
    found = pack(PointerTable.of([np.array([1e30, 1], np.float32)]), "float32", flat, "float32")
    assert found.finite
    assert found.square_norm == pytest.approx(1e60, rel=1e-6)
    ones = np.ones(1 << 25, np.float32)
    found = pack(PointerTable.of([ones]), "float32", np.empty_like(ones), "float32")
    assert found.square_norm == float(1 << 25)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(("tensor", "bucket"), DTYPES)
def test_one_bad_element_anywhere_clears_the_finite_flag(tensor, bucket, bad):
    counts = [0, 1, 37, 0, 130]
    for where in (0, 1, 16, 37, 38, 100, 167):
        values = np.arange(1.0, 169.0)
        values[where] = bad
        ends = list(itertools.accumulate(counts))
        tensors = [np.array(part) for part in np.split(stored(values, tensor), ends[:-1])]
        flat = stored(np.zeros(168), bucket)
        assert not pack(PointerTable.of(tensors), tensor, flat, bucket).finite
        results = [np.empty_like(part) for part in tensors]
        assert not unpack(PointerTable.of(results), tensor, flat, bucket).finite
        np.testing.assert_array_equal(numbers(np.concatenate(results), tensor)[where], bad)


@pytest.mark.parametrize(
    ("tensor", "bucket", "large"),
    [
        ("float32", "float16", 65520.0),
        ("float32", "bfloat16", 3.4028235e38),
        ("float64", "float32", 1e39),
        ("float16", "float16", 40000.0),
    ],
)
def test_what_overflows_when_narrowed_is_not_finite(tensor, bucket, large):
    scale = 2.0 if tensor == bucket else 1.0
    values = stored([1.0, large, 2.0], tensor)
    flat = np.zeros(3, STORAGE[bucket])
    found = pack(PointerTable.of([values]), tensor, flat, bucket, scale)
    assert not found.finite
    assert np.isfinite(found.square_norm)
    assert np.isinf(numbers(flat, bucket)).tolist() == [False, True, False]


def test_a_float64_whose_square_overflows_is_still_finite():
    flat = np.zeros(1)
    found = pack(PointerTable.of([np.array([1e200])]), "float64", flat, "float64")
    assert found == Packed(True, np.inf)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_mean_through_a_half_bucket_neither_overflows_nor_vanishes(dtype):
    small = 2.0**-24 if dtype == "float16" else 2.0**-133
    result = np.empty(2, STORAGE[dtype])
    flat = np.array([160000.0, 4 * small], np.float32)
    unpack(PointerTable.of([result]), dtype, flat, "float32", 4.0)
    assert numbers(result, dtype).tolist() == [numbers(stored([40000.0], dtype), dtype)[0], small]


def test_given_offsets_leave_the_gaps_alone():
    tensors = ramps([2, 0, 3], "float32")
    flat = np.full(9, -1.0, np.float32)
    table = PointerTable.of(tensors, offsets=[6, 7, 1])
    assert table.extent == 8
    pack(table, "float32", flat, "float32")
    assert flat.tolist() == [-1, 3, 4, 5, -1, -1, 1, 2, -1]


def test_tensors_of_any_shape_are_taken_in_c_order():
    tensors = [np.arange(6, dtype=np.float32).reshape(2, 3), np.array(6, np.float32)]
    flat = np.empty(7, np.float32)
    pack(PointerTable.of(tensors), "float32", flat, "float32")
    assert flat.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_null_addresses_of_empty_tensors_are_normal():
    table = PointerTable([0, 0], [0, 0], [0, 0], itemsize=4)
    assert table.extent == 0
    for flat in (np.empty(0, np.float32), np.ones(2, np.float32)):
        before = flat.copy()
        assert pack(table, "float32", flat, "float32", np.inf) == Packed(True, 0.0)
        assert unpack(table, "float32", flat, "float32", 2.0) == Packed(True, 0.0)
        np.testing.assert_array_equal(flat, before)


def test_the_table_keeps_the_memory_alive():
    table = PointerTable.of([np.full(100_000, float(i), np.float32) for i in range(4)])
    gc.collect()
    flat = np.empty(400_000, np.float32)
    pack(table, "float32", flat, "float32")
    np.testing.assert_array_equal(flat, np.repeat(np.arange(4.0), 100_000))


def test_the_table_cannot_be_changed_under_the_kernel():
    counts = np.array([2])
    table = PointerTable([np.zeros(2, np.float32).ctypes.data], counts, [0], itemsize=4)
    counts[0] = 1 << 40
    assert table.counts.tolist() == [2]
    with pytest.raises(ValueError, match="read-only"):
        table.counts[0] = 1 << 40


def test_one_compiled_call_moves_a_whole_bucket(monkeypatch):
    calls = []
    real = packing.pack_kernel("float32", "float32")
    monkeypatch.setattr(
        packing, "pack_kernel", lambda *dtypes: lambda *args: calls.append(dtypes) or real(*args)
    )
    flat = np.empty(200, np.float32)
    pack(PointerTable.of(ramps([5] * 40, "float32")), "float32", flat, "float32")
    assert calls == [("float32", "float32")]
    np.testing.assert_array_equal(flat, np.arange(1, 201))


@pytest.mark.parametrize("module", [packing, reference])
def test_a_bucket_too_small_is_refused_before_anything_is_written(module):
    flat = np.full(7, -1.0, np.float32)
    results = [np.full(4, -2.0, np.float32), np.full(4, -2.0, np.float32)]
    table = PointerTable.of(results)
    message = "bucket of 7 elements is too small: the table reaches 8"
    with pytest.raises(ValueError, match=message):
        module.pack(table, "float32", flat, "float32")
    with pytest.raises(ValueError, match=message):
        module.unpack(table, "float32", flat, "float32")
    assert flat.tolist() == [-1.0] * 7
    assert np.concatenate(results).tolist() == [-2.0] * 8


@pytest.mark.parametrize("module", [packing, reference])
def test_wrong_dtypes_are_refused_with_what_came(module):
    table = PointerTable.of([np.ones(2, np.float32)])
    flat = np.ones(2, np.float32)
    with pytest.raises(
        TypeError, match=r"'int32' with a bucket of 'float32'.*float32 \(float32, fl"
    ):
        module.pack(table, "int32", flat, "float32")
    with pytest.raises(TypeError, match="'float16' with a bucket of 'bfloat16'"):
        module.pack(table, "float16", flat, "bfloat16")
    with pytest.raises(TypeError, match="the table's elements have 4 bytes; float64 has 8"):
        module.pack(table, "float64", flat, "float32")
    with pytest.raises(
        TypeError, match="bucket: expected uint16 storage for bfloat16, got float32"
    ):
        module.pack(table, "float32", flat, "bfloat16")
    with pytest.raises(ValueError, match="bucket: expected a contiguous 1-d array"):
        module.pack(table, "float32", np.ones(4, np.float32)[::2], "float32")
    with pytest.raises(ValueError, match="divisor is 0"):
        module.unpack(table, "float32", flat, "float32", 0)


@pytest.mark.parametrize("module", [packing, reference])
def test_read_only_memory_is_read_but_never_written(module):
    frozen = np.ones(2, np.float32)
    frozen.flags.writeable = False
    table, flat = PointerTable.of([frozen]), np.zeros(2, np.float32)
    module.pack(table, "float32", flat, "float32", 2.0)
    assert flat.tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match="read-only array"):
        module.unpack(table, "float32", flat, "float32")
    with pytest.raises(ValueError, match="bucket: the array is read-only"):
        module.pack(table, "float32", frozen, "float32")
    assert frozen.tolist() == [1.0, 1.0]


def test_tables_that_cannot_be_right_are_refused():
    some = np.ones((4, 4), np.float32)
    with pytest.raises(ValueError, match=r"tensor 1 is not contiguous: shape \(4, 2\)"):
        PointerTable.of([some, some[:, ::2]])
    with pytest.raises(ValueError, match="tensor 0 is not contiguous"):
        PointerTable.of([some[:, :2].T])
    with pytest.raises(TypeError, match="tensor 1 is float64; expected float32, as tensor 0"):
        PointerTable.of([some, np.ones(2)])
    with pytest.raises(
        ValueError, match="tensors 2 and 0 overlap in the bucket: elements 3 to 5 and 4 to 8"
    ):
        PointerTable.of([some[0], some[:0], some[0, :2]], offsets=[4, 4, 3])
    with pytest.raises(ValueError, match="tensor 1: null address for 3 elements"):
        PointerTable([0, 0], [0, 3], [0, 0], itemsize=4)
    with pytest.raises(ValueError, match="tensor 0: counts is -1, expected at least 0"):
        PointerTable([64], [-1], [0], itemsize=4)
    with pytest.raises(ValueError, match="tensor 1: offsets is -2"):
        PointerTable([64, 64], [1, 1], [0, -2], itemsize=4)
    with pytest.raises(ValueError, match="got 2 and 1 for 1"):
        PointerTable([64], [1, 1], [0], itemsize=4)
    with pytest.raises(ValueError, match="memory is not aligned"):
        PointerTable.of([np.zeros(9, np.uint8)[1:].view(np.float32)])
