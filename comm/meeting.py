"""One call of a collective on a board."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.records import (
    NOTE_BYTES,
    SCRATCH_BYTES,
    BoardWord,
    FoldWord,
    Note,
    Place,
    Status,
    Where,
    WorkWord,
)
from . import fused
from .board import Board, differ
from .buffer import address_of
from .call_codes import describe_code
from .errors import CommError, MismatchError
from .fused_pulls import shown_bytes
from .fused_rows import INPUT, OUTPUT, Rows, Shape
from .notices import DIFFER, Row
from .serving import Waiting
from .texts import table
from .trace import Entry, Ring
from .transport.base import Request
from .work import Steps

_ENDED = frozenset(map(int, (Status.DONE, Status.REFUSED, Status.MISMATCH)))


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
    shape: Shape
    address: int
    nbytes: int
    fold: int = 0
    before: float = 1.0
    after: float = 1.0


class Meeting:
    """One call of a collective on a board, ready to run any number of times."""

    launch: Callable[[], int]

    def __init__(self, board: Board, call: Call) -> None:
        from ..kernels.meeting import advance_kernel, launch_kernel

        self.name = call.name
        self._board = board
        self._call = call
        self._advance = advance_kernel()
        self._lists = board.lists()
        self._scratch = np.zeros(SCRATCH_BYTES if call.fold else 0, np.uint8)
        self._record = record = np.zeros(WorkWord.WORDS, np.int64)
        self.address = address_of(record)
        self.bell = int(board.record[BoardWord.BELL])
        # Starts; returns the Status at which this rank has to wait, or has ended.
        self.launch = functools.partial(launch_kernel(), self.address)
        record[WorkWord.BOARD] = board.address
        record[WorkWord.LISTS] = address_of(self._lists)
        record[WorkWord.LIST_BYTES] = self._lists.strides[0]
        record[WorkWord.FOLD] = call.fold
        fold = record[WorkWord.FOLD_RECORD :]
        fold[FoldWord.SCRATCH] = address_of(self._scratch)
        factors = fold.view(np.float64)
        factors[FoldWord.BEFORE], factors[FoldWord.AFTER] = call.before, call.after
        own = self._lists[Where.OWN].data
        own[INPUT] = own[OUTPUT] = call.address
        self._own = own

        self._note = note = record[WorkWord.NOTE : WorkWord.NOTE + Note.WORDS]
        note[Note.CALL], note[Note.COUNT] = call.code, call.shape.count
        note[Note.ROOT] = call.shape.root
        if shown_bytes(call.name, call.shape) <= fused.EAGER_BYTES:
            self.form, note[Note.PLACE] = "eager", Place.UNUSED
        else:
            self.form = self._shows(call.address, call.nbytes) or self._private_form
        self._program = self._lowered()
        self._take(self._program)
        board.meetings[self.address] = self  # last: another thread may close the group meanwhile

    def _shows(self, address: int, nbytes: int) -> str:
        """Note where a buffer lies; return "shared" where the other ranks map it, else ""."""
        place = self._board.memory.place(address, nbytes)
        self._note[Note.PLACE] = Place.PRIVATE if place is None else place
        self._note[Note.ADDRESS] = address
        return "" if place is None else "shared"

    def _lowered(self) -> Rows:
        """Return the program that it begins with."""
        return fused.lower(self.form, self.name, self._call.shape)

    def _otherwise(self) -> Rows:
        """Return the program to go on with: some ranks' buffers are private, so all do as if so."""
        return fused.lower(self._private_form, self.name, self._call.shape)

    def _take(self, rows: Rows) -> None:
        self._rows = rows
        self._record[WorkWord.ROWS], self._record[WorkWord.NUM_ROWS] = address_of(rows), len(rows)

    @property
    def _private_form(self) -> str:
        return fused.private_form(self.name, self._call.shape, self._board.reads)

    @property
    def running(self) -> bool:
        """Tell whether it has not ended, nor come to where Python decides."""
        return bool(self._record[WorkWord.STATUS] == Status.RUNNING)

    @property
    def function(self) -> int:
        """Return the address of the C function that goes on with it."""
        from ..kernels.meeting import advance_callback

        return advance_callback()

    def result_at(self, address: int) -> None:
        """Let the next run write its result to an address."""
        self._own[OUTPUT] = address

    def called(self, ring: Ring, call: int) -> None:
        """Let the ring of operations refer to a call, see `Ring.intern`, by this run and later."""
        if call != self._record[WorkWord.CALLED]:
            self._record[WorkWord.CALLED], self._held = call, ring.hold(call)

    def place(self, ring: Ring, site: str) -> None:
        """Correct where the present run is called, and those that follow."""
        call = ring.place(int(self._record[WorkWord.ENTRY]), site)
        if call:
            self.called(ring, call)

    @property
    def flying(self) -> bool:
        """Tell whether it was started and has not ended."""
        return bool(self._record[WorkWord.FLYING])

    def settle(self) -> None:
        """Wait until no thread is in the middle of a step, which takes a moment at most."""
        while self._record[WorkWord.LOCK]:
            time.sleep(0)

    def steps(self, owner: Any = None, result: Any = None, status: int | None = None) -> Steps:
        """Go on until the work has ended; return the result.

        owner: of the memory that peers read or write meanwhile; alive until then.
        status: that it was started with; it is started by the first step where there is none.
        """
        try:
            if status is None:
                status = self.launch()
            while status not in _ENDED:
                if status == Status.OTHERWISE:
                    self._go_on(self._otherwise())
                else:
                    waiting: list[Request] = [
                        Waiting(int(self._record[WorkWord.WAITING_FOR]), self)
                    ]
                    yield waiting
                status = self._advance(self.address)
        except BaseException:  # what a signal's handler raises, too
            self.abandon(owner)
            raise
        finally:
            if not self.flying:  # as it does where this run was refused, for another's sake
                self._take(self._program)
        if status == Status.REFUSED:
            raise CommError(self._refusal())
        if status == Status.MISMATCH:
            raise MismatchError(self._mismatch())
        return result

    def abandon(self, owner: Any = None) -> None:
        """Give the present run up halfway; nothing where none has started, or it has ended."""
        from ..kernels.meeting import abandon_kernel

        if self.flying:
            self._board.give_up(self.name, owner)
            abandon_kernel()(self.address)

    def _go_on(self, rows: Rows) -> None:
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
        board.settle(own.sequence)
        found = board.differing(own.group, own.sequence)
        ways = len({entry.way for entry in found.values()}) > 1
        shown |= {rank: Row.of(entry).told(ways) for rank, entry in found.items()}
        before = "" if differ(found) else ", longer before than is kept"
        return table(f"{DIFFER} in {own.group}{before}", shown)

    def _entry(self) -> Entry | None:
        """Return what this rank's ring of operations says of the present run."""
        number = int(self._record[WorkWord.ENTRY])
        found = self._board.recent(self._board.rank)
        return next((entry for entry in found if entry.number == number), None)
