"""Random sequences of operations, known to every rank by their seed, against NumPy.

    mpirun -n 3 python tests/fuzz.py --first 1234 --count 1

replays one sequence, which an error names. A sequence mixes collectives and messages on several
groups, of every type, blocking and not, planned and repeated, on buffers of all kinds: ranks of
one call may differ in the kind of their buffer, and in whether they wait. Lengths lie around what
the code treats differently: 0, 1, the number of ranks, the limits of eager and of staged buffers.
Buffers are used again, by calls that are known by them and by others.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from contract import FOLDS, Array

import ringfold
from ringfold import Communicator
from ringfold.comm import boxes, fused
from ringfold.comm.algorithms import BUILDERS
from ringfold.comm.chunks import bounds
from ringfold.comm.dtypes import DTYPES
from ringfold.comm.fused import EAGER_BYTES
from ringfold.comm.fused_rows import STAGE_BYTES

Check = Callable[[Any], None]

COLLECTIVES = (
    "allreduce",
    "reduce",
    "broadcast",
    "allgather",
    "reduce_scatter",
    "gather",
    "scatter",
    "alltoall",
    "barrier",
)
OPERATIONS = (*COLLECTIVES, "allreduce", "allreduce", "message", "message")
REDUCING = ("allreduce", "reduce", "reduce_scatter")
ROOTED = ("reduce", "broadcast", "gather", "scatter")
IN_ROWS = ("alltoall", "scatter")
TYPES = tuple(name for name in DTYPES if name != "bfloat16")  # which NumPy lacks
GUARD = 0xA5
FAMILIAR_TYPES, FAMILIAR_KINDS = ("float32", "int64"), ("plain", "registered", "amid", "strided")
"""Of buffers that come again for certain."""


@contextmanager
def small_limits() -> Iterator[None]:
    """Let small buffers too be read where they are, and their senders wait."""
    kept = fused.READ_FROM, boxes.BUFFERED_BYTES, boxes.IN_PLACE_BYTES
    fused.READ_FROM = dict.fromkeys(fused.READ_FROM, 0)
    boxes.BUFFERED_BYTES, boxes.IN_PLACE_BYTES = 2 * EAGER_BYTES, EAGER_BYTES
    try:
        yield
    finally:
        fused.READ_FROM, boxes.BUFFERED_BYTES, boxes.IN_PLACE_BYTES = kept


@dataclass(frozen=True)
class Group:
    """A way to split the world. colors: by rank; None for a rank that is in no group."""

    name: str
    colors: tuple[int | None, ...]
    backwards: bool

    def members(self, rank: int) -> list[int]:
        """Return the world's ranks of a rank's group, in the group's order; empty for none."""
        color = self.colors[rank]
        found = [r for r, other in enumerate(self.colors) if other == color and color is not None]
        return found[::-1] if self.backwards else found

    def split(self, comm: Communicator) -> Communicator | None:
        key = -comm.rank if self.backwards else comm.rank
        return comm.split(self.colors[comm.rank], key)


def groups_of(size: int) -> tuple[Group, ...]:
    """Return the groups of a world; the first is the world itself."""
    everybody = (0,) * size
    return (
        Group("world", everybody, False),
        Group("backwards", everybody, True),
        Group("by turns", tuple(r % 2 for r in range(size)), False),
        Group("without rank 0", tuple(0 if r else None for r in range(size)), True),
    )


@dataclass(frozen=True)
class Step:
    """One operation of a sequence. kinds, waits, naps and planned are by rank of the world."""

    index: int
    operation: str
    group: Group
    dtype: str
    op: str
    shape: tuple[int, ...]
    root: int
    peer: int
    tag: int
    kinds: tuple[str, ...]
    waits: tuple[str, ...]
    naps: tuple[float, ...]
    planned: tuple[bool, ...]
    algorithm: str | None
    repeats: int


def sequence(seed: int, size: int, length: int = 8) -> list[Step]:
    """Return a sequence, the same on every rank."""
    rng = random.Random(f"{seed} on {size}")
    return [_step(rng, index, size) for index in range(rng.randint(1, 2 * length - 1))]


def _step(rng: random.Random, index: int, size: int) -> Step:
    operation = rng.choice(OPERATIONS)
    group = rng.choice(groups_of(size))
    # In groups of different sizes rows and roots must fit all of them.
    sizes = {len(group.members(rank)) for rank in range(size)} - {0}
    familiar = rng.random() < 0.4
    dtype = rng.choice(FAMILIAR_TYPES if familiar else TYPES)
    op = rng.choice(DTYPES[dtype].ops) if operation in REDUCING else ""
    named = [a for c, a in BUILDERS if c == operation and a != "hierarchical"]
    plain = operation in ("message", "barrier", "scatter") or rng.random() < 0.75
    shape = _shape(rng, size, DTYPES[dtype].itemsize)
    if familiar:
        shape = rng.choice(((5,), (3, size), (size * EAGER_BYTES // 8 + 1,)))
    kinds = FAMILIAR_KINDS if familiar else tuple(KINDS)
    return Step(
        index,
        operation,
        group,
        dtype,
        op,
        shape,
        root=rng.randrange(min(sizes, default=1)),
        peer=rng.randrange(min(sizes, default=1)),
        tag=rng.randrange(3),
        kinds=tuple(rng.choice(kinds) for _ in range(size)),
        waits=tuple(rng.choice(("at once", "at once", "late", "never")) for _ in range(size)),
        naps=tuple(rng.choice((0.0,) * 15 + (0.002,)) for _ in range(size)),
        planned=tuple(operation != "message" and rng.random() < 0.3 for _ in range(size)),
        algorithm=None if plain or not named else rng.choice(named),
        repeats=rng.choice((1, 1, 1, 3)),
    )


def _shape(rng: random.Random, size: int, itemsize: int) -> tuple[int, ...]:
    eager, stage = EAGER_BYTES // itemsize, STAGE_BYTES // itemsize
    small = (0, 1, 2, 3, size - 1, size, size + 1, 2 * size + 1, 2 * rng.randrange(500) + 1)
    near = (eager - 1, eager, eager + 1, eager // size, eager // size + 1)
    large = (stage - 1, stage, stage + 1, 2 * stage + 2 * rng.randrange(999) + 1)
    count = rng.choice(rng.choices((small, near, large), weights=(14, 5, 1))[0])
    rows = rng.choice((1, 1, 1, 2, 3))
    if count == 1 and rng.random() < 0.2:
        return ()
    return (count,) if rows == 1 else (rows, count // rows)


# -- buffers -------------------------------------------------------------------------------


def _whole(shape: tuple[int, ...], x: Array) -> Array:
    return x


def _amid(shape: tuple[int, ...], x: Array) -> Array:
    return x[7 : 7 + math.prod(shape)].reshape(shape)


def _around(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (math.prod(shape) + 12,)


@dataclass(frozen=True)
class Kind:
    """A kind of buffer: memory of a shape, and x as a view of it."""

    memory: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda shape: shape
    view: Callable[[tuple[int, ...], Array], Array] = _whole
    registered: bool = False
    needs_axis: bool = False


KINDS = {
    "plain": Kind(),
    "amid": Kind(_around, _amid),
    "registered": Kind(registered=True),
    "registered amid": Kind(_around, _amid, registered=True),
    "strided": Kind(lambda s: (*s[:-1], 2 * s[-1]), lambda s, x: x[..., ::2], needs_axis=True),
    "mirrored": Kind(view=lambda s, x: x[::-1], needs_axis=True),
    "columns": Kind(lambda s: s[::-1], lambda s, x: x.T),
}


class Buffer:
    """A step's array on one rank, within memory whose other bytes must stay as they are."""

    def __init__(self, comm: Communicator, step: Step, rank: int, shape: tuple[int, ...]) -> None:
        dtype = DTYPES[step.dtype].storage
        kind = KINDS[step.kinds[rank]]
        if kind.needs_axis and not shape:
            kind = KINDS["plain"]
        memory = kind.memory(shape)
        self.whole = comm.empty(memory, dtype) if kind.registered else np.empty(memory, dtype)
        self.whole.reshape(-1).view(np.uint8)[:] = GUARD
        self.view = kind.view(shape, self.whole)

    def fill(self) -> None:
        """Overwrite x with what surrounds it."""
        itemsize = self.view.itemsize
        self.view.view(f"V{itemsize}")[...] = np.void(bytes([GUARD] * itemsize))

    def check_surroundings(self) -> None:
        """See that nothing beside x was written; x is lost."""
        self.fill()
        assert (self.whole.reshape(-1).view(np.uint8) == GUARD).all(), "memory beside x was written"


class Shelf:
    """Buffers of one rank that no call uses any more, to be used again."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._free: defaultdict[tuple[object, ...], list[Buffer]] = defaultdict(list)

    def take(self, step: Step, shape: tuple[int, ...]) -> Buffer:
        """Return a buffer that is GUARD all over, the last one of its kind if there is one."""
        rank = self._comm.rank
        free = self._free[step.kinds[rank], step.dtype, shape]
        return free.pop() if free else Buffer(self._comm, step, rank, shape)

    def put(self, step: Step, shape: tuple[int, ...], buffer: Buffer) -> None:
        """Take a buffer back whose call has ended."""
        buffer.check_surroundings()
        free = self._free[step.kinds[self._comm.rank], step.dtype, shape]
        if len(free) < 2 and buffer.whole.nbytes <= 4 * EAGER_BYTES:
            free.append(buffer)


def values(seed: int, step: Step, rank: int, turn: int, shape: tuple[int, ...]) -> Array:
    """Return what a rank brings: small whole numbers, exact in every type however added."""
    dtype = DTYPES[step.dtype]
    index = np.arange(int(np.prod(shape, dtype=np.int64)))
    mixed = (index + index // 7 + 3 * rank + 5 * step.index + 11 * turn + seed) % 7
    if step.op == "prod":
        mixed = mixed % 2 + 1
    elif dtype.storage.kind == "c":
        mixed = (mixed - 3) * (1 - 2j) + 1j * rank
    elif dtype.storage.kind in "if":
        mixed = mixed - 3
    elif dtype.storage.kind == "b":
        mixed = mixed % 2
    return mixed.astype(dtype.storage).reshape(shape)


def combined(op: str, rows: list[Array]) -> Array:
    """Return the reduction of the members' arrays, computed in float64 or complex128."""
    wide = np.result_type(rows[0].dtype, np.float64)
    folded = FOLDS[op](np.stack([row.astype(wide) for row in rows]))
    return folded.astype(rows[0].dtype)


# -- running -------------------------------------------------------------------------------


class Player:
    """Run sequences on one rank of a world."""

    def __init__(self, comm: Communicator) -> None:
        self.world = comm
        self.rank = comm.rank
        self.shelf = Shelf(comm)
        self.groups = {group.name: group.split(comm) for group in groups_of(comm.size)[1:]}
        self.groups["world"] = comm

    def close(self) -> None:
        for name, comm in self.groups.items():
            if comm is not None and name != "world":
                comm.close()

    def play(self, seed: int) -> None:
        """Run one sequence. Raises: what went wrong, with the seed and the step as a note."""
        late: list[tuple[Step, Any, Check]] = []
        with self._groups_anew() if seed % 8 == 7 else nullcontext():
            for step in sequence(seed, self.world.size):
                with self._told(seed, step):
                    self._run(seed, step, late)
            random.Random(f"{seed} by {self.rank}").shuffle(late)
            for step, work, check in late:
                with self._told(seed, step):
                    check(work.wait())

    @contextmanager
    def _groups_anew(self) -> Iterator[None]:
        """Run on a group that is made for this sequence and closed after it."""
        group = groups_of(self.world.size)[2]
        kept, made = self.groups[group.name], group.split(self.world)
        self.groups[group.name] = made
        yield
        self.groups[group.name] = kept
        if made is not None:
            made.close()

    @contextmanager
    def _told(self, seed: int, step: Step) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            size = self.world.size
            error.add_note(
                f"rank {self.rank} of {size}, in {step}\nplay it again: "
                f"mpirun -n {size} python tests/fuzz.py --first {seed} --count 1"
            )
            raise

    def _run(self, seed: int, step: Step, late: list[tuple[Step, Any, Check]]) -> None:
        comm = self.groups[step.group.name]
        if comm is None:
            return
        if step.naps[self.rank]:
            time.sleep(step.naps[self.rank])
        wait = step.waits[self.rank]
        if step.operation == "message":
            self._message(seed, step, comm, late)
            return
        x, shape = None, self._shape_on(step, comm)
        if step.operation != "barrier" and (step.operation != "scatter" or comm.rank == step.root):
            x = self.shelf.take(step, shape)
        arguments = _arguments(step, None if x is None else x.view)
        call = partial(getattr(comm, step.operation), **arguments)
        planned = call
        if step.planned[self.rank]:
            planned = comm.plan(step.operation, **arguments)
        for turn in range(step.repeats):
            if x is not None:
                x.view[...] = values(seed, step, self.rank, turn, shape)
            check = partial(self._check, seed, step, turn, x, shape, comm.rank)
            if wait == "at once" or turn < step.repeats - 1:
                check(planned())
            else:
                work = call(blocking=False)
                if wait == "late":
                    late.append((step, work, check))

    def _shape_on(self, step: Step, comm: Communicator) -> tuple[int, ...]:
        return (comm.size, *step.shape) if step.operation in IN_ROWS else step.shape

    def _check(
        self,
        seed: int,
        step: Step,
        turn: int,
        x: Buffer | None,
        shape: tuple[int, ...],
        me: int,
        result: Any,
    ) -> None:
        members = step.group.members(self.rank)
        rows = [values(seed, step, rank, turn, shape) for rank in members]
        if step.operation == "barrier":
            return
        right = EXPECTED[step.operation](step, rows, me)
        if step.operation in ("allreduce", "reduce", "broadcast"):
            assert x is not None and result is x.view, "the result is not x"
            np.testing.assert_array_equal(result, right)
        else:
            if right is None:
                assert result is None, f"got {result!r} where None was due"
            else:
                np.testing.assert_array_equal(result, right)
                assert result.dtype == right.dtype
            if x is not None:
                np.testing.assert_array_equal(x.view, rows[me], "x was changed")
        if x is not None and turn == step.repeats - 1:
            self.shelf.put(step, shape, x)

    def _message(
        self,
        seed: int,
        step: Step,
        comm: Communicator,
        late: list[tuple[Step, Any, Check]],
    ) -> None:
        src, dst = step.root, step.peer
        wait = step.waits[self.rank]
        if comm.rank == src:
            x = self.shelf.take(step, step.shape)
            x.view[...] = values(seed, step, self.rank, 0, step.shape)
            if wait == "at once" and src != dst:
                comm.send(x.view, dst, step.tag)
                self.shelf.put(step, step.shape, x)
            else:
                put = partial(self.shelf.put, step, step.shape, x)
                late.append((step, comm.isend(x.view, dst, step.tag), lambda _: put()))
        if comm.rank == dst:
            y = self.shelf.take(step, step.shape)
            sender = step.group.members(self.rank)[src]
            right = values(seed, step, sender, 0, step.shape)

            def check(result: Any) -> None:
                assert result is y.view
                np.testing.assert_array_equal(result, right)
                self.shelf.put(step, step.shape, y)

            if wait == "at once":
                check(comm.recv(y.view, src, step.tag))
            else:
                late.append((step, comm.irecv(y.view, src, step.tag), check))


def _arguments(step: Step, x: Array | None) -> dict[str, Any]:
    if step.operation == "barrier":
        return {}
    arguments: dict[str, Any] = {"x": x}
    if step.operation in REDUCING:
        arguments["op"] = step.op
    if step.operation in ROOTED:
        arguments["root"] = step.root
    if step.algorithm is not None:
        arguments["algorithm"] = step.algorithm
    return arguments


def _reduce_scattered(step: Step, rows: list[Array], me: int) -> Array:
    whole = combined(step.op, rows).reshape(-1)
    low, high = bounds(whole.size, len(rows), me)
    return whole[low:high]


EXPECTED: dict[str, Callable[[Step, list[Array], int], Array | None]] = {
    "allreduce": lambda step, rows, me: combined(step.op, rows),
    "reduce": lambda step, rows, me: combined(step.op, rows) if me == step.root else rows[me],
    "broadcast": lambda step, rows, me: rows[step.root],
    "allgather": lambda step, rows, me: np.stack(rows),
    "reduce_scatter": _reduce_scattered,
    "gather": lambda step, rows, me: np.stack(rows) if me == step.root else None,
    "scatter": lambda step, rows, me: rows[step.root][me],
    "alltoall": lambda step, rows, me: np.stack([row[me] for row in rows]),
}
"""operation -> (step, the members' arrays, this rank in the group) -> its result on this rank."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Play random sequences; see the module.")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--count", type=int, default=1000, help="sequences (default: 1000)")
    found = parser.parse_args()
    with small_limits(), ringfold.Communicator() as comm:
        player = Player(comm)
        start = time.perf_counter()
        for seed in range(found.first, found.first + found.count):
            player.play(seed)
        player.close()
        took = time.perf_counter() - start
        if comm.rank == 0:
            print(f"{found.count} sequences from {found.first}, {comm}, in {took:.0f} s: all right")


if __name__ == "__main__":
    main()
