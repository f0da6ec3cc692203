"""What every device kernel must do: one body for Numba's simulator and for a GPU.

Memory is Numba's own, so no other array library is needed. Buffers lie between guards, at chosen
distances from an alignment of 64 bytes; reading one back checks its guards.
"""

import dataclasses
import itertools
import mmap
from types import SimpleNamespace

import numpy as np
import pytest

from ringfold.kernels import masks, reference
from ringfold.kernels.operations import ALLOWED
from ringfold.kernels.storage import FLOATS, HALVES, PARTS, STORAGE
from ringfold.kernels.table import PAIRS, Packed, PointerTable

GUARD = 64
LAYOUTS = [[], [0, 0], [1], [0, 3, 0, 70, 1], [37, 16], [33] * 5, [300]]
DTYPES = [(tensor, bucket) for tensor, buckets in PAIRS.items() for bucket in buckets]
REAL = (*FLOATS, *HALVES)


@pytest.fixture
def kernels():
    """The modules of the kernels, which import Numba CUDA."""
    from ringfold.kernels import device
    from ringfold.kernels.device import combine, fold, launch, masks, pack, table, threshold

    found = (combine, fold, launch, masks, pack, table, threshold)
    return SimpleNamespace(**dict(zip(device.__all__, found, strict=True)))


def same(first, second, dtype):
    """Equal to the last bit, but any NaN stands for any other."""
    if dtype in HALVES:
        first, second = (reference.to_float32(x, dtype) for x in (first, second))
    if first.dtype.kind != "f":
        return bool((first == second).all())
    word = f"u{first.itemsize}"
    equal = first.view(word) == second.view(word)
    return bool((equal | (np.isnan(first) & np.isnan(second))).all())


def noise(count, dtype, seed, *, special=False):
    """Values of all signs and sizes that differ by seed; `special` adds NaN, infinities, zeros."""
    rng = np.random.default_rng([seed, count])
    storage = STORAGE[dtype]
    if dtype == "bool":
        return rng.integers(0, 2, count).astype(storage)
    if storage.kind in "iu" and dtype not in HALVES:
        limits = np.iinfo(storage)
        return rng.integers(limits.min, limits.max, count, storage, endpoint=True)
    values = rng.normal(size=count) * 10.0 ** rng.integers(-6, 4, count)
    if special:
        odd = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, 65519.0, 65520.0, 3.4e38]
        values[rng.integers(0, max(count, 1), count // 4)] = rng.choice(odd, count // 4)
    if dtype == "float64":
        return values
    with np.errstate(over="ignore"):
        return reference.from_float32(values.astype(np.float32), dtype)


class Memory:
    """A buffer on the device, `shift` bytes beside an alignment of 64."""

    def __init__(self, kernels, launcher, content, shift=0):
        self.kernels, self.content = kernels, content
        room = GUARD + 64 + shift + content.nbytes + GUARD
        raw = np.full(room, 0xA5, np.uint8)
        self.placed = kernels.table.place(raw, launcher)
        self.start = GUARD + -(self.placed.span.address + GUARD) % 64 + shift
        raw[self.start : self.start + content.nbytes] = content.view(np.uint8)
        self.placed.owner[:] = raw
        self.address = self.placed.span.address + self.start
        self.span = kernels.table.Span(self.address if content.size else 0, content.size)

    def read(self):
        raw = self.placed.read()
        end = self.start + self.content.nbytes
        assert (raw[: self.start] == 0xA5).all() and (raw[end:] == 0xA5).all(), "written outside"
        return raw[self.start : end].view(self.content.dtype)


def agrees(found, wanted, count):
    assert found.finite is wanted.finite
    tolerance = reference.norm_tolerance(count)
    np.testing.assert_allclose(found.square_norm, wanted.square_norm, rtol=tolerance)


class Bucket:
    """Tensors at unlike alignments and the bucket they belong to, with the host's twins of both."""

    def __init__(self, kernels, launcher, dtypes, counts, *, special=False, bucket_shift=0):
        tensor, bucket = dtypes
        size = STORAGE[tensor].itemsize
        self.arrays = [noise(n, tensor, i, special=special) for i, n in enumerate(counts)]
        gaps = [i % 3 for i in range(len(counts))]
        starts = list(itertools.accumulate(map(sum, zip(counts, gaps, strict=True)), initial=0))
        offsets = [start + gap for start, gap in zip(starts, gaps, strict=False)]
        self.host = noise(starts[-1] + 2, bucket, 99)
        self.tensors = [
            Memory(kernels, launcher, array, shift=i * size) for i, array in enumerate(self.arrays)
        ]
        self.bucket = Memory(kernels, launcher, self.host, shift=bucket_shift)
        self.table = PointerTable.of(self.arrays, offsets)
        placed = PointerTable(
            addresses=np.array([memory.span.address for memory in self.tensors], np.int64),
            counts=np.array(counts, np.int64),
            offsets=np.array(offsets, np.int64),
            itemsize=size,
        )
        tile = 32 if max(counts, default=0) < 100 else 144
        self.tiles = kernels.table.Tiles.of(placed, *dtypes, launcher, tile=tile)
        self.learned = kernels.table.ByProducts.of(launcher)


@pytest.mark.parametrize("counts", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
def test_pack(kernels, launcher, dtypes, counts):
    case = Bucket(kernels, launcher, dtypes, counts, special=len(counts) > 4)
    launched = kernels.pack.pack(
        case.tiles, case.bucket.span, launcher, scale=0.3, learned=case.learned
    )
    assert launched is (sum(counts) > 0)
    wanted = reference.pack(case.table, dtypes[0], case.host, dtypes[1], 0.3)
    assert same(case.bucket.read(), case.host, dtypes[1])
    agrees(case.learned.read(launcher), wanted, sum(counts))


@pytest.mark.parametrize("counts", LAYOUTS[1:], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
def test_unpack(kernels, launcher, dtypes, counts):
    shift = STORAGE[dtypes[1]].itemsize
    case = Bucket(kernels, launcher, dtypes, counts, bucket_shift=shift)
    kernels.pack.unpack(case.tiles, case.bucket.span, launcher, divisor=3.0, learned=case.learned)
    wanted = reference.unpack(case.table, dtypes[0], case.host, dtypes[1], 3.0)
    for memory, array in zip(case.tensors, case.arrays, strict=True):
        assert same(memory.read(), array, dtypes[0])
    assert same(case.bucket.read(), case.host, dtypes[1])
    agrees(case.learned.read(launcher), wanted, sum(counts))


class Counted:
    """A kernel that counts its launches: the simulator takes one of no blocks without a word."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches, self.__name__ = kernel, launches, kernel.__name__

    def __getitem__(self, grid):
        self.launches.append(grid)
        return self.kernel[grid]


@pytest.mark.parametrize("bucket_dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "counts", [[], [0], [0, 3], [1], [127], [128], [129], [1025], [3, 0, 130, 1]], ids=str
)
def test_no_launch_of_nothing_and_no_thread_beyond_the_end(
    kernels, launcher, counts, bucket_dtype, monkeypatch
):
    """PR-13: empty lists, null pointers, last partial blocks, and threads at a barrier."""
    launches, made = [], kernels.pack.transfer_kernel
    monkeypatch.setattr(kernels.pack, "transfer_kernel", lambda *how: Counted(made(*how), launches))
    numbers = (np.arange(1, sum(counts) + 1) % 1000).astype(np.float32)
    ends = np.cumsum(counts, dtype=np.int64)
    arrays = [numbers[end - count : end] for count, end in zip(counts, ends, strict=True)]
    tensors = [Memory(kernels, launcher, array) for array in arrays]
    bucket = Memory(kernels, launcher, np.full(sum(counts), 7, STORAGE[bucket_dtype]))
    table = PointerTable(
        addresses=np.array([memory.span.address for memory in tensors], np.int64),
        counts=np.array(counts, np.int64),
        offsets=ends - np.array(counts, np.int64),
        itemsize=4,
    )
    tiles = kernels.table.Tiles.of(table, "float32", bucket_dtype, launcher, tile=32)
    learned = kernels.table.ByProducts.of(launcher)
    kernels.pack.pack(tiles, bucket.span, launcher, scale=0.5, learned=learned)
    half = (numbers / 2).astype(STORAGE[bucket_dtype])
    assert same(bucket.read(), half, bucket_dtype)
    assert learned.read(launcher).finite is True
    kernels.pack.unpack(tiles, bucket.span, launcher, divisor=0.5, learned=learned)
    for memory, array in zip(tensors, arrays, strict=True):
        assert same(memory.read(), array, "float32")
    assert len(launches) == (2 if sum(counts) else 0)
    assert all(grid[0] > 0 for grid in launches)


@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("float16", "float16")]
)
def test_pack_add(kernels, launcher, dtypes):
    for counts in ([0, 3, 70], [200]):
        case = Bucket(kernels, launcher, dtypes, counts, special=True)
        kernels.pack.pack_add(case.tiles, case.bucket.span, launcher, learned=case.learned)
        wanted = reference.pack_add(case.table, dtypes[0], case.host, dtypes[1])
        assert same(case.bucket.read(), case.host, dtypes[1])
        agrees(case.learned.read(launcher), wanted, sum(counts))


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 40, 69])
def test_one_element_that_is_not_finite_is_told_and_then_forgotten(
    kernels, launcher, broken, where
):
    """In the vectors, at the ends, and in the launch after: the result is of one pass alone."""
    case = Bucket(kernels, launcher, ("float32", "bfloat16"), [70])
    good = case.arrays[0].copy()
    for value, finite in ((broken, False), (1.0, True)):
        good[where] = value
        again = Memory(kernels, launcher, good)
        table = PointerTable(np.array([again.address]), np.array([70]), np.array([0]), 4)
        tiles = kernels.table.Tiles.of(table, "float32", "bfloat16", launcher, tile=32)
        kernels.pack.pack(tiles, case.bucket.span, launcher, learned=case.learned)
        assert case.learned.read(launcher).finite is finite


def test_what_is_learned_of_nothing(kernels, launcher):
    """A launch of no blocks is illegal, and an empty tensor's pointer is null.

    After a full bucket an empty one launches nothing, and nothing old is read.
    """
    full = Bucket(kernels, launcher, ("float32", "float32"), [5])
    kernels.pack.pack(full.tiles, full.bucket.span, launcher, learned=full.learned)
    assert full.learned.read(launcher).square_norm > 0
    none = Bucket(kernels, launcher, ("float32", "float32"), [0, 0])
    assert not kernels.pack.pack(none.tiles, none.bucket.span, launcher, learned=full.learned)
    assert full.learned.read(launcher) == Packed(True, 0.0)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 31, 300])
@pytest.mark.parametrize(
    ("source", "target"),
    [("float32", half) for half in HALVES]
    + [(half, "float32") for half in HALVES]
    + [("float32", "float32"), ("float64", "float64"), ("bfloat16", "bfloat16")],
)
def test_cast(kernels, launcher, source, target, count):
    values = noise(count, source, 3, special=True)
    there = Memory(kernels, launcher, values, shift=2 * STORAGE[source].itemsize)
    into = Memory(kernels, launcher, np.zeros(count, STORAGE[target]), shift=0)
    for divisor in (1.0, 3.0, -0.25):
        launched = kernels.pack.cast(
            there.span, source, into.span, target, launcher, divisor=divisor
        )
        assert launched is (count > 0)
        with np.errstate(all="ignore"):
            wide = values if source == "float64" else reference.to_float32(values, source)
            wide = wide / wide.dtype.type(divisor)
        wanted = wide if target == "float64" else reference.from_float32(wide, target)
        assert same(into.read(), wanted, target)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("op", ALLOWED)
def test_combine(kernels, launcher, op, dtype):
    if dtype not in ALLOWED[op] or dtype in PARTS:
        a = Memory(kernels, launcher, noise(3, dtype, 1))
        with pytest.raises(TypeError, match=dtype):
            kernels.combine.combine(op, dtype, a.span, a.span, launcher)
        return
    size = STORAGE[dtype].itemsize
    for count, shift in ((0, 0), (1, size), (37, size), (53, 0), (400 // size, size)):
        target, incoming = (noise(count, dtype, seed, special=True) for seed in (1, 2))
        a = Memory(kernels, launcher, target, shift=shift)
        b = Memory(kernels, launcher, incoming, shift=size)
        assert kernels.combine.combine(op, dtype, a.span, b.span, launcher) is (count > 0)
        reference.combine(op, dtype)(target, incoming)
        assert same(a.read(), target, dtype), count
        assert same(b.read(), incoming, dtype), count


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("op", ALLOWED)
def test_accumulate(kernels, launcher, op, dtype):
    for count in (0, 3, 45, 150):
        target, incoming = noise(count, "float32", 1), noise(count, dtype, 2, special=True)
        a, b = Memory(kernels, launcher, target), Memory(kernels, launcher, incoming)
        kernels.combine.accumulate(op, dtype, a.span, b.span, launcher)
        reference.accumulate(op, dtype)(target, incoming)
        assert same(a.read(), target, "float32"), count


FOLDS = [
    (op, dtype, ranks)
    for dtype in (*REAL, "int8", "uint16", "int64", "bool")
    for op in (*ALLOWED, "mean")
    if dtype in (REAL if op == "mean" else ALLOWED[op])
    for ranks in ((1, 2, 5) if op == "sum" else (2, 5))
]


@pytest.mark.parametrize(("op", "dtype", "ranks"), FOLDS)
def test_fold_of_several_ranks_copies(kernels, launcher, op, dtype, ranks):
    size, length, low = STORAGE[dtype].itemsize, 60, 7
    copies = [noise(length, dtype, rank, special=True) for rank in range(ranks)]
    memories = [Memory(kernels, launcher, copy) for copy in copies]
    peers = kernels.fold.Peers.of(tuple(memory.address for memory in memories), launcher)
    some = kernels.fold.Peers.of(peers.addresses[::2], launcher)
    for targets, chosen, count in ((some, copies[::2], 11), (peers, copies, 43), (peers, [], 0)):
        launched = kernels.fold.fold(
            op, dtype, peers, targets, count, launcher,
            skip=low * size, into=low * size, first=2.0, last=3.0,
        )  # fmt: skip
        assert launched is (count > 0)
        part = slice(low, low + count)
        reference.fold(
            op, dtype, [copy[part] for copy in copies], [copy[part] for copy in chosen], 2.0, 3.0
        )
    for memory, copy in zip(memories, copies, strict=True):
        assert same(memory.read(), copy, dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "int8"])
@pytest.mark.parametrize("last", [4.0, 3.0])
def test_fold_of_more_than_a_thread_reads_at_once(kernels, launcher, dtype, last):
    """A power of two divides by its reciprocal, which has to give the same bits."""
    op = "sum" if dtype == "int8" else "mean"
    launcher = dataclasses.replace(launcher, blocks=1, threads=2)
    count = 300 // STORAGE[dtype].itemsize
    copies = [noise(count, dtype, rank, special=True) for rank in range(3)]
    memories = [Memory(kernels, launcher, copy) for copy in copies]
    peers = kernels.fold.Peers.of(tuple(memory.address for memory in memories), launcher)
    kernels.fold.fold(op, dtype, peers, peers, count, launcher, first=2.0, last=last)
    reference.fold(op, dtype, copies, copies, 2.0, last)
    for memory, copy in zip(memories, copies, strict=True):
        assert same(memory.read(), copy, dtype)


def test_fold_into_targets_that_are_aligned_unlike(kernels, launcher):
    copies = [noise(41, "float32", rank) for rank in range(4)]
    memories = [
        Memory(kernels, launcher, copy, shift=4 * (rank > 1)) for rank, copy in enumerate(copies)
    ]
    addresses = [memory.address for memory in memories]
    sources = kernels.fold.Peers.of(tuple(addresses[:2]), launcher)
    for first, last in ((2, 4), (1, 3)):
        targets = kernels.fold.Peers.of(tuple(addresses[first:last]), launcher)
        kernels.fold.fold("sum", "float32", sources, targets, 41, launcher)
        reference.fold("sum", "float32", copies[:2], copies[first:last])
    for memory, copy in zip(memories, copies, strict=True):
        assert same(memory.read(), copy, "float32")


def test_fold_where_peers_are_aligned_unlike(kernels, launcher):
    copies = [noise(41, "float32", rank) for rank in range(3)]
    memories = [Memory(kernels, launcher, copy, shift=4 * rank) for rank, copy in enumerate(copies)]
    peers = kernels.fold.Peers.of(tuple(memory.address for memory in memories), launcher)
    kernels.fold.fold("sum", "float32", peers, peers, 41, launcher)
    reference.fold("sum", "float32", copies, copies)
    for memory, copy in zip(memories, copies, strict=True):
        assert same(memory.read(), copy, "float32")


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
@pytest.mark.parametrize("count", [1, 50])
def test_threshold(kernels, launcher, dtype, count):
    ties = noise(count, dtype, 8)
    ties[: count // 2] = ties[-1]
    selection = kernels.threshold.Selection.of(launcher)
    for values in (ties, noise(count, dtype, 9, special=True)):
        there = Memory(kernels, launcher, values, shift=2 * STORAGE[dtype].itemsize)
        for wanted in {count // 3 + 1, count}:
            kernels.threshold.threshold(there.span, dtype, wanted, selection, launcher)
            found = selection.read(launcher)
            expected = reference.threshold(values, dtype, wanted)
            np.testing.assert_equal(tuple(found), expected)


@pytest.mark.parametrize("shift", [0, 3, 8])
@pytest.mark.parametrize(
    ("rows", "count"), [(0, 0), (3, 0), (1, 1), (2, 7), (1, 8), (3, 33), (2, 80)]
)
def test_mask(kernels, launcher, rows, count, shift):
    """The host's words, whatever the place, and for keys and samples beyond 32 bits."""
    for sample, key, p in ((0, (0, 0), 0.0), (5, (1 << 63, 7), 0.3), (1 << 40, (3, 1 << 50), 1.0)):
        least = round(p * 2**32)
        wanted = np.zeros(rows * count, np.uint8)
        masks.mask(wanted, rows, sample, key, least)
        found = Memory(kernels, launcher, np.full(rows * count, 9, np.uint8), shift=shift)
        launched = kernels.masks.mask(found.span, rows, sample, key, least, launcher)
        assert launched is (wanted.size > 0)
        np.testing.assert_array_equal(found.read(), wanted)


def test_misuse_is_refused_before_a_launch(kernels, launcher):
    k, span = kernels, kernels.table.Span
    case = Bucket(kernels, launcher, ("float32", "bfloat16"), [5, 6])
    short = span(case.bucket.address, case.tiles.extent - 1)
    refused = [
        (ValueError, "too small", lambda: k.pack.pack(case.tiles, short, launcher)),
        (
            ValueError,
            "divisor",
            lambda: k.pack.unpack(case.tiles, case.bucket.span, launcher, divisor=0),
        ),
        (ValueError, "null address", lambda: span(0, 3).check("float32", "x")),
        (ValueError, "not aligned to 4 bytes", lambda: span(6, 3).check("float32", "x")),
        (ValueError, "expected 0 elements or more", lambda: span(8, -1).check("int8", "x")),
        (
            ValueError,
            "3 elements .* 4",
            lambda: k.combine.combine("sum", "float32", span(64, 3), span(64, 4), launcher),
        ),
        (
            TypeError,
            "int8",
            lambda: k.pack.cast(span(64, 3), "int8", span(64, 3), "int8", launcher),
        ),
        (
            TypeError,
            "float16.*bfloat16",
            lambda: k.pack.cast(span(64, 3), "float16", span(64, 3), "bfloat16", launcher),
        ),
        (ValueError, "1 to 3 elements, got 4", lambda: wanting(4)),
        (ValueError, "none null", lambda: k.fold.Peers.of((64, 0), launcher)),
        (ValueError, "power of two", lambda: k.launch.Launcher(threads=48)),
        (ValueError, "at least 1", lambda: k.launch.Launcher(blocks=0)),
        (ValueError, "multiple of 16", lambda: k.table.cut(case.table, 24)),
    ]

    def wanting(number):
        selection = k.threshold.Selection.of(launcher)
        k.threshold.threshold(span(64, 3), "float32", number, selection, launcher)

    for kind, message, call in refused:
        with pytest.raises(kind, match=message):
            call()


def test_by_products_for_a_smaller_grid_are_refused(kernels, launcher):
    case = Bucket(kernels, launcher, ("float32", "float32"), [5])
    larger = kernels.launch.Launcher(blocks=launcher.max_blocks + 1, threads=launcher.threads)
    with pytest.raises(ValueError, match="by-products"):
        kernels.pack.pack(case.tiles, case.bucket.span, larger, learned=case.learned)


def test_equal_launches_give_equal_norms(kernels, launcher):
    case = Bucket(kernels, launcher, ("float32", "bfloat16"), [33] * 5)
    norms = set()
    for _ in range(3):
        kernels.pack.pack(case.tiles, case.bucket.span, launcher, learned=case.learned)
        norms.add(case.learned.read(launcher).square_norm)
    assert len(norms) == 1


def check_a_place_beyond_four_giga_elements(kernels, launcher, known=lambda memory: None):
    """In host memory that is only promised: one page of it is ever touched.

    known: lets kernels touch it.
    """
    place = (1 << 32) + 5
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, of Linux
    room = mmap.mmap(-1, 2 * place + 4096, flags=flags)
    bucket = np.frombuffer(room, np.uint16)
    tensor = np.array([1.0, -2.0, 3.0], np.float32)
    known(bucket)
    known(tensor)
    table = PointerTable.of([tensor], [place])
    tiles = kernels.table.Tiles.of(table, "float32", "bfloat16", launcher)
    span = kernels.table.Span(bucket.ctypes.data, bucket.size)
    kernels.pack.pack(tiles, span, launcher)
    assert bucket[place - 1 : place + 4].tolist() == [0, 0x3F80, 0xC000, 0x4040, 0]
