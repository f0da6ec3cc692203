"""Programs over shared memory, for all ranks at once: right sums, and no rank in another's way.

Between two meetings ranks go on in any order, so what one writes there, no other may touch.  Real
ranks show that by luck alone: here every element that is read or written is noted.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt
import pytest

from ringfold.comm import board, fused
from ringfold.comm.chunks import bounds
from ringfold.comm.fused_pulls import shown_bytes
from ringfold.comm.fused_rows import INPUT, Rows, Shape
from ringfold.kernels.records import ALL, PAIR, Row, Where

STAGE_BYTES = 512
Key = tuple[object, int]
"""(what it is, whose it is)."""
At = tuple[Key, int]
"""An array, and an element of it."""

IN_PLACE = ("allreduce", "reduce", "broadcast")
WHOLE = ("allreduce", "reduce", "broadcast", "scatter", "alltoall", "reduce_scatter")
IN_ROWS = ("scatter", "alltoall")
KINDS = [
    (form, name)
    for form in ("shared", "eager", "staged", "cma")
    for name in fused.NAMES
    if form != "cma" or name in fused.READ_FROM
]


@dataclass(frozen=True)
class Call:
    """One collective of all ranks."""

    number: int
    form: str
    name: str
    count: int
    root: int


class Node:
    """The memory of a node's ranks, and who has read and written what since they last met."""

    def __init__(self, size: int, itemsize: int) -> None:
        self.size, self.itemsize = size, itemsize
        self.arrays: dict[Key, npt.NDArray[np.int64]] = {}
        self.touched: dict[tuple[Key, str], npt.NDArray[np.bool_]] = {}
        edges = [*board._places(size).items(), (-1, board._area_bytes(size))]
        for (place, start), (_, end) in pairwise(edges):
            for rank in range(size):
                self.arrays[place, rank] = np.full((end - start) // itemsize, -1)

    def part(self, rank: int, at: At, count: int, how: str) -> npt.NDArray[np.int64]:
        """Return elements, as they lie; how: whether the rank "reads" or "writes" them."""
        key, first = at
        array = self.arrays[key]
        assert 0 <= first <= first + count <= len(array), f"{at} + {count} is outside {len(array)}"
        noted = self.touched.setdefault((key, how), np.zeros((self.size, len(array)), np.bool_))
        noted[rank, first : first + count] = True
        return array[first : first + count]

    def meet(self) -> None:
        """Look whether ranks were in each other's way, and forget."""
        for (key, how), noted in self.touched.items():
            written = self.touched.get((key, "writes"), np.zeros_like(noted))
            for rank in range(self.size):
                others = np.delete(noted, rank, axis=0).any(axis=0)
                assert not (written[rank] & others).any(), f"rank {rank} writes what another {how}"
        self.touched.clear()

    def run(self, rank: int, call: Call) -> Iterator[None]:
        """Run one rank's program up to each meeting; before and after it the arrays are its own."""
        own: list[Key] = [((call.number, "buffer"), rank), ((call.number, "result"), rank)]
        result = own[0 if call.name in IN_PLACE else 1]
        names: dict[tuple[int, int], At] = {}

        def place(which: int, entry: int, offset: int) -> At:
            at, rest = divmod(offset, self.itemsize)
            assert not rest
            if (which, entry) in names:
                key, first = names[which, entry]
                return key, first + at
            if which == Where.OWN:
                return (own[0] if entry == INPUT else result), at
            if which in (Where.BUFFERS, Where.PEERS):
                return (own[0][0], entry), at
            return (which + (call.number % 2 if which == Where.EAGER else 0), entry), at

        def everything_is_its_own() -> None:
            for key in own:
                self.part(rank, (key, 0), len(self.arrays[key]), "writes")

        everything_is_its_own()
        for kind, target, entry, offset, source, origin, start, length in self.rows(rank, call):
            if kind == Row.MEET:
                yield
            elif kind == Row.POINT:
                names[target, entry] = place(source, origin, start)
            elif kind == Row.FOLD:
                entries = {ALL: range(self.size), PAIR: range(2)}.get(entry, [entry])
                froms = [place(source, peer, start) for peer in range(self.size)]
                total = sum(self.part(rank, at, length, "reads") for at in froms)
                for at in [place(target, one, offset) for one in entries]:
                    self.part(rank, at, length, "writes")[:] = total
            else:
                count, rest = divmod(length, self.itemsize)
                assert not rest and kind in (Row.COPY, Row.READ, Row.WRITE)
                moved = self.part(rank, place(source, origin, start), count, "reads").copy()
                self.part(rank, place(target, entry, offset), count, "writes")[:] = moved
        everything_is_its_own()

    def rows(self, rank: int, call: Call) -> list[list[int]]:
        shape = Shape(rank, self.size, call.count, self.itemsize, call.root, STAGE_BYTES)
        rows: Rows = fused.lower(call.form, call.name, shape)
        return rows.tolist()

    def bring(self, call: Call, rng: np.random.Generator) -> dict[int, npt.NDArray[np.int64]]:
        """Give every rank its arrays; return what its result must be, where it gets one."""
        size, whole = self.size, call.count
        each = {"barrier": 0}.get(call.name, whole if call.name in WHOLE else whole // size)
        data = rng.integers(0, 1 << 40, (size, each))
        gathered, total = data.ravel(), data.sum(axis=0)
        right = {
            "allreduce": lambda rank: total,
            "reduce": lambda rank: total if rank == call.root else data[rank],
            "reduce_scatter": lambda rank: total[slice(*bounds(whole, size, rank))],
            "broadcast": lambda rank: data[call.root],
            "allgather": lambda rank: gathered,
            "gather": lambda rank: gathered if rank == call.root else gathered[:0],
            "scatter": lambda rank: data[call.root].reshape(size, -1)[rank],
            "alltoall": lambda rank: data.reshape(size, size, -1)[:, rank].ravel(),
            "barrier": lambda rank: gathered,
        }[call.name]
        for rank in range(size):
            self.arrays[(call.number, "buffer"), rank] = data[rank].copy()
            self.arrays[(call.number, "result"), rank] = np.full(len(right(rank)), -1)
        return {rank: right(rank) for rank in range(size)}


def run(size: int, itemsize: int, calls: list[Call]) -> None:
    """Run calls one after the other on all ranks, and look at what comes of them."""
    node, rng = Node(size, itemsize), np.random.default_rng(len(calls))
    right = [node.bring(call, rng) for call in calls]
    ranks = [chain.from_iterable(map(partial(node.run, rank), calls)) for rank in range(size)]
    going = True
    while going:
        order = rng.permutation(size)
        met = {next(ranks[rank], "ended") for rank in order}
        assert len(met) == 1, "ranks meet unequally often"
        node.meet()
        going = met == {None}
    for call, results in zip(calls, right, strict=True):
        which = "buffer" if call.name in IN_PLACE else "result"
        for rank, expected in results.items():
            assert (node.arrays[(call.number, which), rank] == expected).all(), (call, rank)


@pytest.fixture(autouse=True)
def small_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "STAGE_BYTES", STAGE_BYTES)


def fitting(number: int, form: str, name: str, per_rank: int, size: int, itemsize: int) -> Call:
    """Return a call of some elements a rank, or as many of them as its form takes."""
    count = per_rank * size + (0 if name not in WHOLE or name in IN_ROWS else per_rank % 3)
    call = Call(number, form, name, 0 if name == "barrier" else count, per_rank % size)
    shape = Shape(0, size, call.count, itemsize, call.root)
    if form == "eager" and shown_bytes(name, shape) > fused.EAGER_BYTES:
        return fitting(number, form, name, per_rank // 2, size, itemsize)
    return call


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("form, name", KINDS)
def test_no_rank_touches_what_another_writes(form: str, name: str, size: int) -> None:
    """Several times, as a call begins where ranks of the one before may still be at its end."""
    for itemsize in (2, 8):
        for per_rank in (0, 1, 64 // itemsize + 1, 1500 // itemsize):
            calls = [fitting(at, form, name, per_rank, size, itemsize) for at in range(3)]
            run(size, itemsize, calls)


@pytest.mark.parametrize("seed", range(12))
def test_no_call_touches_what_the_one_before_writes(seed: int) -> None:
    rng = random.Random(seed)
    size, itemsize = rng.choice([2, 3, 4]), rng.choice([1, 2, 4, 8])
    calls = [
        fitting(at, *rng.choice(KINDS), rng.randrange(3000 // itemsize), size, itemsize)
        for at in range(12)
    ]
    run(size, itemsize, calls)
