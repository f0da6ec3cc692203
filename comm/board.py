"""Where the ranks of a group on one node meet."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from itertools import count, takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..kernels.records import (
    LINE_BYTES,
    NOTE_BYTES,
    BoardWord,
    Where,
)
from . import fused
from .cma import access
from .fused_rows import STAGE_BYTES, Shape
from .memory import Block
from .node_memory import NodeMemory, look_counts, yielding
from .notices import MESSAGES, Row
from .trace import Entry, Ring, entries_in

if TYPE_CHECKING:
    from .communicator import Communicator
    from .meeting import Meeting

Words = npt.NDArray[np.int64]


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
        # By the addresses of their records.
        self.meetings: weakref.WeakValueDictionary[int, Meeting] = weakref.WeakValueDictionary()
        self._blocks = blocks
        self._bases = np.array([nodes.addresses[row[1]] for row in members.tolist()], np.int64)
        self._traces = [nodes.traces[row[1]] for row in members.tolist()]
        self._areas = self._bases + members[:, 2]
        self._bell = nodes.bell
        self._bells = np.array([nodes.bell_of(row[1]) for row in members.tolist()], np.int64)
        control = int(self._bases[0] + members[0, 3])
        self.record = np.zeros(BoardWord.WORDS, np.int64)
        self.address = int(self.record.ctypes.data)
        self.record[BoardWord.FLAGS] = control
        self.record[BoardWord.NOTES] = control + self.size * LINE_BYTES
        self.record[BoardWord.BASES] = self._bases.ctypes.data
        self.record[BoardWord.RANK], self.record[BoardWord.SIZE] = rank, self.size
        self.record[BoardWord.YIELD] = yielding()
        spins, yields = look_counts(len(nodes.addresses))
        self.record[BoardWord.SPINS], self.record[BoardWord.YIELDS] = spins, yields
        self._processes = np.zeros(self.size, np.int64)
        if nodes.processes is not None:
            self._processes[:] = nodes.processes[members[:, 1]]
            self.record[BoardWord.READ], self.record[BoardWord.WRITE] = access()
            self.record[BoardWord.PROCESSES] = self._processes.ctypes.data
        self.record[BoardWord.BELL] = self._bell.ctypes.data
        self.record[BoardWord.BELLS] = self._bells.ctypes.data
        self._lists = np.zeros((Where.LENGTH, max(self.size, 2)), np.int64)
        for which, offset in _places(self.size).items():
            self._lists[which, : self.size] = self._areas + offset

    @property
    def reads(self) -> bool:
        """Tell whether each rank has access to the others' own memory, see `cma.accessible`."""
        return bool(self.record[BoardWord.READ])

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
        if nodes.memory is not None:
            for block in blocks:  # nobody has seen them
                nodes.memory.release(block)
        return None

    def note_in(self, ring: Ring, counter: Words, settle: Callable[[int], None]) -> None:
        """Note every work in a ring, and count it in `counter`, see `kernels.records.Count`.

        settle: is told the number of a call in which all ranks have seen that they differ.
        """
        self._ring, self._counter, self.settle = ring, counter, settle
        self.record[BoardWord.RING] = ring.address
        self.record[BoardWord.COUNTER] = counter.ctypes.data

    def recent(self, rank: int) -> tuple[Entry, ...]:
        """Return the last operations of a rank of the group."""
        return entries_in(self._traces[rank])

    def differing(self, group: str, sequence: int) -> dict[int, Entry]:
        """Return what the ranks, as far as is known, called as number `sequence` of a group.

        Or before, by messages since the ranks last met, where these calls are the first to differ.
        """
        called = [self._calls(rank, group) for rank in range(self.size)]

        def at(number: int) -> dict[int, Entry]:
            return {rank: calls[number] for rank, calls in enumerate(called) if number in calls}

        def sent(number: int) -> bool:
            return any(entry.way for entry in at(number).values())

        numbers = [sequence, *takewhile(sent, count(sequence - 1, -1))]
        return at(next((number for number in reversed(numbers) if differ(at(number))), sequence))

    def _calls(self, rank: int, group: str) -> dict[int, Entry]:
        return {
            entry.sequence: entry
            for entry in self.recent(rank)
            if entry.group == group and entry.signature.operation not in MESSAGES
        }

    def shape(self, count: int, itemsize: int, root: int) -> Shape:
        """Return what this rank's program of a call depends on."""
        return Shape(self.rank, self.size, count, itemsize, root)

    def lists(self) -> Words:
        """Return a table of addresses that programs name, to fill in: a row for each Where."""
        return self._lists.copy()

    def give_up(self, name: str, buffer: Any) -> None:
        """Refuse everything from now on: a work ended before the ranks were done with it.

        buffer: what peers may still write to; nothing else is to come to lie there, also where the
            group is dropped.
        """
        self.memory.keep([(lambda: False, buffer)])
        self.broken = f"an earlier {name} was given up halfway, so the ranks may differ"
        self.record[BoardWord.BROKEN] = 1

    def refuse(self, why: str) -> None:
        """Refuse everything from now on.

        When this returns, no thread looks at the board but for a work: what one was launching
        meanwhile has come to where it waits, and is refused there.
        """
        self.broken = self.broken or why
        self.record[BoardWord.BROKEN] = 1
        for reference in self.meetings.valuerefs():  # a list, whatever others add meanwhile
            meeting = reference()
            if meeting is not None:
                meeting.settle()

    def close(self) -> None:
        """Give the shared memory back, which no rank of the group may use any more."""
        for block in self._blocks:
            self.memory.release(block)
        self._blocks = ()


def differ(calls: Mapping[int, Entry]) -> bool:
    """Tell whether ranks disagree about a call, given what each called."""
    rows = [Row.of(call) for call in calls.values()]
    return any(row.differs(rows[0]) for row in rows)


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
    return places


def _area_bytes(size: int) -> int:
    return _places(size)[Where.RESULT_1] + STAGE_BYTES + LINE_BYTES
