"""Run programs over MPI in compiled code: `comm.executor.execute`, without the interpreter.

The plain executor stays the reference, and is used where this one finds no way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ...kernels.message_words import Slot, Status, Word
from ...kernels.records import Outcome
from ..buffer import address_of
from ..executor import MOVE, Arithmetic, Native, Route
from ..program import Program
from ..trace import Ring
from ..work import Steps
from .base import Calls, Request

Array = npt.NDArray[Any]

_DONE = int(Status.DONE)
_RING, _CALLED, _SEQUENCE, _ENTRY = map(int, (Word.RING, Word.CALLED, Word.SEQUENCE, Word.ENTRY))
_RUNNING = int(Status.RUNNING)
_SCRATCH, _WINDOW = int(Word.SCRATCH), int(Word.ADDING)
_CALLS, _MEMORY = slice(Word.ISEND, Word.BYTE + 1), slice(Word.ROWS, Word.SCRATCH)
_ADDING, _DIVISORS = slice(Word.SLOT_BYTES, Word.BEFORE), slice(Word.BEFORE, Word.SEGMENT)
_SLOTS = slice(Word.SEGMENT, Word.TAG)

FIRST_LOOKS = 20
"""Looks for a message before the caller who started it gets control back: a few microseconds."""

PATIENT_LOOKS = 150
"""Looks while somebody waits, the last hundred after yielding the core each.

Some tens of microseconds where cores are free. Where they are not, each yield may cost a time slice
of another process, and nobody checks for lost peers or advances other works meanwhile.
"""


class Awaited:
    """What a program that waits shows of it: the rank at the other end."""

    def __init__(self, peer: int) -> None:
        self.peer = peer

    def done(self) -> bool:
        """Tell nothing: only the program itself can look."""
        return False


@dataclass
class InFlight:
    """What programs of one group share: free scratch, and memory that MPI may still write to."""

    free: list[Array] = field(default_factory=list)
    abandoned: list[object] = field(default_factory=list)

    def take(self, nbytes: int) -> Array:
        """Return at least as many bytes; give() them back."""
        for at, scratch in enumerate(self.free):
            if scratch.size >= nbytes:
                return self.free.pop(at)
        self.free.clear()
        return np.empty(nbytes, np.uint8)

    def give(self, scratch: Array) -> None:
        """Keep scratch for the next program."""
        self.free.append(scratch)


def can_run(calls: Calls | None, program: Program, arithmetic: Arithmetic) -> bool:
    """Tell whether a program can be run in compiled code."""
    return calls is not None and (arithmetic.native is not None or not program.adds)


class Compiled:
    """One program bound to its memory, ready to run any number of times."""

    def __init__(
        self,
        program: Program,
        route: Route,
        source: Array,
        target: Array,
        arithmetic: Arithmetic = MOVE,
        in_flight: InFlight | None = None,
    ) -> None:
        """Bind flat `source` and `target`, which may be one array; see `execute`."""
        from ...kernels.messages import advance_kernel

        calls = route.transport.calls
        assert calls is not None and can_run(calls, program, arithmetic)
        self._bound = (program, route, source, target, arithmetic)
        self._calls = calls
        self._in_flight = InFlight() if in_flight is None else in_flight
        self._advance = advance_kernel()
        self._busy = False
        native = Native() if arithmetic.native is None else arithmetic.native()
        total = target if arithmetic.accumulator is None else arithmetic.accumulator
        segment = max(1, route.segment_bytes // source.itemsize)
        slot_bytes = min(segment, program.most_added) * target.itemsize
        # Slots do not start at the same place of a page: their loads and stores would collide.
        slot_bytes += -slot_bytes % 64 + (64 if slot_bytes % 4096 == 0 and slot_bytes else 0)
        self._scratch_bytes = route.window * slot_bytes
        slots = max(route.window, route.moving)
        self._slots = np.zeros(slots * Slot.WORDS, np.int64)
        self._status = np.zeros(calls.status_bytes // 8 + 1, np.int64)
        self._record = record = np.zeros(Word.WORDS, np.int64)
        record[_CALLS] = (
            calls.isend,
            calls.irecv,
            calls.test,
            calls.get_count,
            calls.pause,
            calls.comm,
            calls.byte,
        )
        record[_MEMORY] = (
            program.address,
            len(program.rows),
            address_of(source),
            address_of(target),
            source.itemsize,
            address_of(total),
            total.itemsize,
        )
        record[_ADDING] = (
            slot_bytes,
            native.add,
            native.widen,
            native.narrow,
        )
        record[_DIVISORS].view(np.float64)[:] = native.before, native.after
        record[_SLOTS] = (
            segment,
            slots,
            address_of(self._slots),
            address_of(self._status),
        )
        self._at = address_of(record)
        self._words = record.data
        self._words[_WINDOW] = route.window
        self._ring: Ring | None = None

    def note(self, ring: Ring, call: int, sequence: int) -> None:
        """Let the next run note in a ring, from compiled code, that it starts and how it ends."""
        words, self._ring = self._words, ring
        words[_RING], words[_CALLED], words[_SEQUENCE] = ring.address, call, sequence

    def run(self, tag: int) -> Steps:
        """Run once; yields the ranks it waits for.

        It is sent True where somebody waits for it, and then looks longer before it yields again.
        """
        if self._busy:
            # A run that was given up, or goes on after a timeout: MPI may still use its records.
            other = Compiled(*self._bound, self._in_flight)
            if self._ring is not None:
                other.note(self._ring, self._words[_CALLED], self._words[_SEQUENCE])
            yield from other.run(tag)
            return
        self._busy = True
        scratch = self._in_flight.take(self._scratch_bytes)
        self._words[_SCRATCH] = address_of(scratch)
        status = _RUNNING
        try:
            status = self._advance(self._at, tag, FIRST_LOOKS)
            while status == _RUNNING:
                patient = yield self._pending()
                status = self._advance(self._at, -1, PATIENT_LOOKS if patient else 1)
            if status != _DONE:
                raise self._failure(status)
        finally:
            if status == _DONE:
                self._busy = False
                self._in_flight.give(scratch)
            else:
                self._in_flight.abandoned.append((self, scratch))
                if self._ring is not None:
                    self._ring.end(self._words[_ENTRY], Outcome.FAILED)

    def _pending(self) -> list[Request]:
        tail = int(self._record[Word.TAIL]) % int(self._record[Word.WINDOW])
        slot = self._slots[tail * Slot.WORDS : (tail + 1) * Slot.WORDS].tolist()
        waiting: list[Request] = []
        if slot[Slot.RECEIVING]:
            waiting.append(Awaited(slot[Slot.SRC]))
        if slot[Slot.SENDING]:
            waiting.append(Awaited(slot[Slot.DST]))
        return waiting

    def _failure(self, status: int) -> Exception:
        record = self._record
        peer, wanted = int(record[Word.FAILED_PEER]), int(record[Word.FAILED_WANTED])
        if status == Status.WRONG_SIZE:
            return self._calls.wrong_size(peer, int(record[Word.FAILED_GOT]), wanted)
        code = int(record[Word.FAILED_CODE])
        return self._calls.refused(code, peer, None if wanted < 0 else wanted)
