"""Where the ranks of a group on one node meet, and the works they do there."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ..kernels.records import (
    LINE_BYTES,
    NOTE_BYTES,
    SCRATCH_BYTES,
    BoardWord,
    Note,
    Place,
    Status,
    Where,
    WorkWord,
)
from . import fused
from .call_codes import describe_code
from .errors import CommError, MismatchError
from .memory import Block
from .node_memory import NodeMemory, patience, yielding
from .notices import DIFFER, MESSAGES, Row, table
from .trace import Entry, Ring, entries_in
from .transport.base import Request
from .work import Steps

if TYPE_CHECKING:
    from .communicator import Communicator

Words = npt.NDArray[np.int64]

STAGE_BYTES = 1 << 18
"""Of one staging place; two of them and two results of a part fit the second-level cache."""


_SLEEPS = 50
"""Of the background thread, before it lets Python see to what else there is."""


class Board:
    """One rank's side of a group on one node."""

    def __init__(
        self, rank: int, members: Words, nodes: NodeMemory, blocks: tuple[Block, ...]
    ) -> None:
        """members: a row per rank: (node token, node rank, offset of area, offset of control)."""
        assert nodes.memory is not None
        self.rank, self.size = rank, len(members)
        self.memory = nodes.memory
        self.broken = ""
        self._blocks = blocks
        self._bases = np.array([nodes.addresses[row[1]] for row in members.tolist()], np.int64)
        self._traces = [nodes.traces[row[1]] for row in members.tolist()]
        self._areas = self._bases + members[:, 2]
        self._bell = nodes.bell
        self._bells = np.array([nodes.bell_of(row[1]) for row in members.tolist()], np.int64)
        control = int(self._bases[0] + members[0, 3])
        self.record = np.zeros(BoardWord.WORDS, np.int64)
        self.record[BoardWord.FLAGS] = control
        self.record[BoardWord.NOTES] = control + self.size * LINE_BYTES
        self.record[BoardWord.BASES] = self._bases.ctypes.data
        self.record[BoardWord.RANK], self.record[BoardWord.SIZE] = rank, self.size
        self.record[BoardWord.YIELD] = yielding()
        spins, yields = patience(len(nodes.addresses))
        self.record[BoardWord.SPINS], self.record[BoardWord.YIELDS] = spins, yields
        self.record[BoardWord.BELL] = self._bell.ctypes.data
        self.record[BoardWord.BELLS] = self._bells.ctypes.data
        self.stage_bytes = STAGE_BYTES

    @classmethod
    def open(cls, comm: Communicator, nodes: NodeMemory) -> Board | None:
        """Open the board of a group; collective. None where the group has no shared memory."""
        row = np.zeros(4, np.int64)
        blocks: tuple[Block, ...] = ()
        if nodes.token and nodes.memory is not None:
            area = nodes.memory.allocate(_area_bytes(comm.size))
            control = nodes.memory.allocate(comm.size * (LINE_BYTES + 2 * NOTE_BYTES))
            blocks = (area, control)
            row[:] = nodes.token, nodes.rank, area.offset, control.offset
        members = comm.allgather(row)
        if comm.size > 1 and nodes.token and (members[:, 0] == nodes.token).all():
            return cls(comm.rank, members, nodes, blocks)
        for block in blocks:  # nobody has seen them
            nodes.release(block)
        return None

    def note_in(self, ring: Ring, counter: Words) -> None:
        """Note every work in a ring, and count it in the first word of `counter`."""
        self._ring, self._counter = ring, counter
        self.record[BoardWord.RING] = ring.address
        self.record[BoardWord.COUNTER] = counter.ctypes.data

    def recent(self, rank: int) -> tuple[Entry, ...]:
        """Return the last operations of a rank of the group."""
        return entries_in(self._traces[rank])

    def entries(self, group: str, sequence: int) -> list[Entry | None]:
        """Return what each rank called as number `sequence` of a group, None for unknown."""
        return [
            next(
                (
                    entry
                    for entry in reversed(self.recent(rank))
                    if (entry.group, entry.sequence) == (group, sequence)
                    and entry.signature.operation not in MESSAGES
                ),
                None,
            )
            for rank in range(self.size)
        ]

    def lists(self) -> Words:
        """Return the table of addresses that programs name: a row for each Where."""
        table = np.zeros((Where.LENGTH, max(self.size, 2)), np.int64)
        for which, offset in _places(self.size).items():
            table[which, : self.size] = self._areas + offset
        return table

    def give_up(self, name: str) -> None:
        """Refuse everything from now on: a work ended before the ranks were done with it."""
        self.broken = f"an earlier {name} was given up halfway, so the ranks may differ"
        self.record[BoardWord.BROKEN] = 1

    def close(self) -> None:
        """Give the shared memory back, which no rank of the group may use any more."""
        for block in self._blocks:
            self.memory.release(block)
        self._blocks = ()


def _places(size: int) -> dict[int, int]:
    """Return where each list's place lies in a rank's area."""
    result = -(-STAGE_BYTES // size // LINE_BYTES) * LINE_BYTES + LINE_BYTES
    places, offset = {}, 0
    for which, nbytes in (
        (Where.EAGER, fused.EAGER_BYTES),
        (Where.EAGER + 1, fused.EAGER_BYTES),
        (Where.STAGE_0, STAGE_BYTES),
        (Where.STAGE_1, STAGE_BYTES),
        (Where.RESULT_0, result),
        (Where.RESULT_1, result),
    ):
        places[int(which)] = offset
        offset += nbytes
    places[-1] = offset
    return {which: offset for which, offset in places.items() if which >= 0}


def _area_bytes(size: int) -> int:
    return _places(size)[Where.RESULT_1] + STAGE_BYTES + LINE_BYTES


@dataclass(frozen=True)
class Call:
    """What all ranks of a group must agree on, and what this rank brings.

    code: a number for operation, op and dtype.
    address, nbytes: this rank's flat buffer.
    fold: address of the compiled fold, 0 where nothing is added.
    before, after: its divisors.
    """

    name: str
    code: int
    shape: fused.Shape
    address: int
    nbytes: int
    fold: int = 0
    before: float = 1.0
    after: float = 1.0


class Served(Protocol):
    """A work that compiled code goes on with: the address of its record, and of the C function.

    bell: address of the rank's BellWord record.
    """

    address: int
    bell: int

    @property
    def function(self) -> int: ...


class Waiting:
    """What a work in shared memory shows of itself: the rank that it waits for."""

    def __init__(self, peer: int, work: Served) -> None:
        self.peer = peer
        self.work = work

    def done(self) -> bool:
        """Tell nothing: only the work itself can look."""
        return False


class Server:
    """Goes on with works in compiled code, on a thread that holds no interpreter lock."""

    def __init__(self) -> None:
        self._turn = np.zeros(1, np.int64)

    @property
    def turn(self) -> int:
        """Return what `serve` wants to know of when the works to serve were listed."""
        return int(self._turn[0])

    def interrupt(self) -> None:
        """Let what `serve` was told be out of date: it returns when it next looks."""
        self._turn[0] += 1

    def serve(self, waiting: list[Waiting], turn: int) -> None:
        """Go on with what waits until one work can be finished, a moment at most."""
        from ..kernels.meeting import serve_kernel

        works = [one.work for one in waiting]
        functions = np.array([work.function for work in works], np.int64)
        records = np.array([work.address for work in works], np.int64)
        serve_kernel()(functions, records, self._turn.ctypes.data, turn, works[0].bell, _SLEEPS)


class Meeting:
    """One call of a collective on a board, ready to run any number of times."""

    def __init__(self, board: Board, call: Call) -> None:
        from ..kernels.meeting import advance_kernel, launch_kernel

        self.name = call.name
        self._board = board
        self._call = call
        self._advance = advance_kernel()
        self._lists = board.lists()
        self._scratch = np.zeros(SCRATCH_BYTES if call.fold else 0, np.uint8)
        self._record = record = np.zeros(WorkWord.WORDS, np.int64)
        self.address = int(record.ctypes.data)
        self.bell = int(board.record[BoardWord.BELL])
        # Starts; returns the Status at which this rank has to wait, or has ended.
        self.launch: Callable[[], int] = functools.partial(launch_kernel(), self.address)
        record[WorkWord.BOARD] = board.record.ctypes.data
        record[WorkWord.LISTS] = self._lists.ctypes.data
        record[WorkWord.LIST_BYTES] = self._lists.strides[0]
        record[WorkWord.FOLD] = call.fold
        record[WorkWord.FOLD_RECORD + 7] = self._scratch.ctypes.data
        factors = record[WorkWord.FOLD_RECORD :].view(np.float64)
        factors[8], factors[9] = call.before, call.after
        self._own(fused.INPUT, call.address)
        self._own(fused.OUTPUT, call.address)

        note = record[WorkWord.NOTE : WorkWord.NOTE + Note.WORDS]
        place = board.memory.place(call.address, call.nbytes)
        note[Note.CALL], note[Note.COUNT] = call.code, call.shape.count
        note[Note.ROOT] = call.shape.root
        if fused_eagerly(call):
            self.form, note[Note.PLACE] = "eager", Place.UNUSED
        elif place is None:
            self.form, note[Note.PLACE] = "staged", Place.PRIVATE
        else:
            self.form, note[Note.PLACE] = "shared", place
        programs = {"eager": fused.eager, "staged": fused.staged, "shared": fused.shared}
        self._program = programs[self.form](call.name, call.shape)
        self._take(self._program)

    def _take(self, rows: fused.Rows) -> None:
        self._rows = rows
        self._record[WorkWord.ROWS], self._record[WorkWord.NUM_ROWS] = rows.ctypes.data, len(rows)

    def _own(self, entry: int, address: int) -> None:
        self._lists[Where.OWN, entry] = address

    @property
    def function(self) -> int:
        """Return the address of the C function that goes on with it."""
        from ..kernels.meeting import advance_callback

        return advance_callback()

    def result_at(self, address: int) -> None:
        """Let the next run write its result to an address."""
        self._own(fused.OUTPUT, address)

    def called(self, call: int) -> None:
        """Let the ring of operations refer to a call, see trace.Ring.intern."""
        self._record[WorkWord.CALLED] = call

    @property
    def flying(self) -> bool:
        """Tell whether it was started and has not ended."""
        return bool(self._record[WorkWord.FLYING])

    def steps(self, status: int, owner: Any = None) -> Steps:
        """Go on from a status until the work has ended; return the owner, alive until then."""
        from ..kernels.meeting import abandon_kernel

        try:
            while status != Status.DONE:
                if status == Status.REFUSED:
                    raise CommError(self._refusal())
                if status == Status.MISMATCH:
                    raise MismatchError(self._mismatch())
                if status == Status.MIXED:
                    self._go_on(fused.staged(self.name, self._call.shape))
                else:
                    waiting: list[Request] = [
                        Waiting(int(self._record[WorkWord.WAITING_FOR]), self)
                    ]
                    yield waiting
                status = self._advance(self.address)
        except GeneratorExit:
            self._board.give_up(self.name)
            abandon_kernel()(self.address)
            raise
        self._take(self._program)
        return owner

    def _go_on(self, rows: fused.Rows) -> None:
        """Some ranks' buffers are private: all go on as if theirs were."""
        self._take(rows)
        self._record[WorkWord.ROW] = 0
        self._record[WorkWord.STATUS] = Status.RUNNING

    def _refusal(self) -> str:
        rank = self._board.rank
        if self._board.broken:
            return f"rank {rank}: {self._board.broken}"
        return f"rank {rank}: this {self.name} on the same array is still in flight"

    def _mismatch(self) -> str:
        board = self._board
        block = int(board.record[BoardWord.NOTES])
        block += int(self._record[WorkWord.TICKET] & 1) * board.size * NOTE_BYTES
        size = board.size * Note.WORDS
        words = np.array((ctypes.c_int64 * size).from_address(block)[:], np.int64)
        rows = words.reshape(board.size, Note.WORDS)
        shown = {
            rank: f"{describe_code(int(row[Note.CALL]))}, {row[Note.COUNT]} elements, "
            f"root {row[Note.ROOT]}"
            for rank, row in enumerate(rows)
        }
        own = self._entry()
        if own is None:
            return table(DIFFER, shown)
        for rank, entry in enumerate(board.entries(own.group, own.sequence)):
            if entry is not None:
                shown[rank] = str(Row.of(entry))
        return table(f"{DIFFER} in {own.group}", shown)

    def _entry(self) -> Entry | None:
        """Return what this rank's ring of operations says of the present run."""
        number = int(self._record[WorkWord.ENTRY])
        found = self._board.recent(self._board.rank)
        return next((entry for entry in found if entry.number == number), None)


def fused_eagerly(call: Call) -> bool:
    """Tell whether a call's buffers are small enough to be copied for everybody."""
    shown = [
        fused.own_bytes(call.name, fused.Shape(r, s.size, s.count, s.itemsize, s.root))
        for s in (call.shape,)
        for r in (0, s.root)
    ]
    return max(shown) <= fused.EAGER_BYTES
