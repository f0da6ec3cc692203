"""The last operations of a rank, always kept: what it called, where, when, and how it ended.

A ring of records of int64 words and a table of what they refer to lie in one piece of memory, which
peers on the node map: they can read what a rank did last even where it is dead, or stuck. Noting an
operation allocates nothing; compiled code notes meetings on boards by itself.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
import time
import weakref
from dataclasses import dataclass
from enum import Enum
from time import monotonic_ns
from types import CodeType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..kernels.records import (
    RING_BYTES,
    RING_CALLS,
    RING_ENTRIES,
    EntryWord,
    Outcome,
    RingWord,
)
from .dtypes import DTYPES
from .work import Steps

Bytes = npt.NDArray[np.uint8]

_CALL_BYTES = 256
_TEXT_BYTES = _CALL_BYTES - 8
TRACE_BYTES = RING_BYTES + RING_CALLS * _CALL_BYTES
"""Of a rank's ring with its table of calls."""

_NAME_BYTES = 64
"""Of a group or of a way at most; what is left of _TEXT_BYTES, 30 at least, is a site's."""

_MASK = RING_ENTRIES - 1
_LATELY = 64
"""Calls that are held anyway, as those on arrays that come and go are held again and again."""
# Plain numbers: arithmetic of enumerations takes longer than all the rest of noting a call.
_HEAD, _ENTRY_WORDS = int(RingWord.WORDS), int(EntryWord.WORDS)
_DONE, _FAILED = int(Outcome.DONE), int(Outcome.FAILED)
_CLOCK_MONOTONIC_COARSE = 6
"""The same clock at the kernel's last tick, quicker to read (linux/time.h; `time` has no name)."""
_QUIET = ("ringfold", "torch", "contextlib")
"""Whose frames are not where the user called; a `with` of ringfold's enters by the last."""


class Signature(NamedTuple):
    """What a call asks for; of a collective, what all ranks must agree on.

    operation: as the method.  op: of the reduction, "" for none.  dtype: its NumPy name.
    elements: of this rank's x; of a scatter the root alone knows them, and the dtype.
    peer: the root; of a message the rank at the other end; -1 for neither.
    """

    operation: str
    op: str = ""
    dtype: str = ""
    elements: int = 0
    peer: int = -1

    def __str__(self) -> str:
        inside = ", ".join(text for text in (self.op, self.dtype) if text)
        return f"{self.operation}({inside})"


class State(Enum):
    """How far an operation is; FAILED also where it was given up."""

    RUNNING = Outcome.RUNNING
    DONE = Outcome.DONE
    FAILED = Outcome.FAILED


@dataclass(frozen=True)
class Entry:
    """One operation of one rank.

    number: of the rank's operations, from 1.
    sequence: of the group's collectives, from 1, equal on all of its ranks; messages count apart.
    group, size: by what was split from what: "world", "world.node", "world.1", ...; its ranks.
    site: file:line of the first caller outside ringfold and torch; of a plan, where it was made;
        of a call that did not wait, where its like was called before on the same array.
    start, end: nanoseconds of CLOCK_MONOTONIC, which all processes of a node share; end is 0 while
        it runs, and up to 10 ms too early (never before start) unless a timeline is recorded.
    way: of a collective over messages, the algorithm, or another name for how they go; else "".
    """

    number: int
    sequence: int
    group: str
    size: int
    signature: Signature
    site: str
    start: int
    end: int
    state: State
    way: str = ""

    @property
    def nbytes(self) -> int:
        """Return the bytes of this rank's x."""
        sig = self.signature
        return sig.elements * DTYPES[sig.dtype].itemsize if sig.dtype else 0

    def __str__(self) -> str:
        sig = self.signature
        peer = f", rank {sig.peer}" if sig.peer >= 0 else ""
        return (
            f"{self.group} #{self.sequence} {sig}, {sig.elements} elements{peer}, at {self.site}: "
            f"{self.state.name.lower()}"
        )


_Key = tuple[Signature, str, int, str, str]


class Held:
    """A call that is made again and again: as long as this lives, entries can refer to it."""

    __slots__ = ("__weakref__",)


class Ring:
    """The last RING_ENTRIES operations of one rank, over all of its groups."""

    def __init__(self) -> None:
        self._calls: dict[_Key, int] = {}
        self._keys: list[_Key | None] = [None] * RING_CALLS
        self._held: dict[int, weakref.ref[Held]] = {}  # by place in the table
        self._lately: list[Held | None] = [None] * _LATELY
        self._interned = 0
        self._place(np.zeros(TRACE_BYTES, np.uint8))
        self._words[RingWord.CLOCK] = (
            ctypes.cast(ctypes.CDLL(None).clock_gettime, ctypes.c_void_p).value or 0
        )
        self._words[RingWord.STARTS] = time.CLOCK_MONOTONIC
        self._words[RingWord.ENDS] = _CLOCK_MONOTONIC_COARSE

    def _place(self, memory: Bytes) -> None:
        self.memory = memory
        self.address = int(memory.ctypes.data)
        self._words = memory[:RING_BYTES].data.cast("q")

    def move(self, memory: Bytes) -> None:
        """Go on in another memory of TRACE_BYTES, before compiled code has seen this one."""
        memory[:TRACE_BYTES] = self.memory
        self._place(memory[:TRACE_BYTES])

    def withdraw(self) -> None:
        """Go on in private memory: compiled code notes nothing, and no peer reads it, any more."""
        self.move(np.zeros(TRACE_BYTES, np.uint8))

    def time_ends(self) -> None:
        """Let compiled code take the exact time of an end too: 16 ns more for each operation."""
        self._words[RingWord.ENDS] = time.CLOCK_MONOTONIC

    def intern(self, signature: Signature, group: str, size: int, site: str, way: str = "") -> int:
        """Return the number of a call by which entries refer to it, from 1."""
        key = signature, group, size, site, way
        known = self._calls.get(key)
        return self._describe(key) if known is None else known

    def _describe(self, key: _Key) -> int:
        numbers = range(self._interned + 1, self._interned + 1 + RING_CALLS)
        call = next((one for one in numbers if not self._is_held(one)), numbers[0])
        self._interned = call
        place = call % RING_CALLS
        self._held.pop(place, None)
        old, self._keys[place] = self._keys[place], None
        if old is not None:
            del self._calls[old]
        low = RING_BYTES + place * _CALL_BYTES
        number = self.memory[low : low + 8].view(np.int64)
        # No call's while its text is written, of which a signal's handler may leave a part.
        number[0] = 0
        self.memory[low + 8 : low + _CALL_BYTES] = np.frombuffer(_encoded(key), np.uint8)
        number[0] = call
        self._keys[place], self._calls[key] = key, call
        return call

    def hold(self, call: int) -> Held:
        """Keep a call that was just interned in the table, as long as the result is alive.

        Where all are kept it gives its place away all the same.
        """
        place = call % RING_CALLS
        known = self._held.get(place)
        held = None if known is None else known()
        if held is None:
            held = self._lately[place % _LATELY] = Held()
            self._held[place] = weakref.ref(held)
        return held

    def _is_held(self, call: int) -> bool:
        known = self._held.get(call % RING_CALLS)
        return known is not None and known() is not None

    def place(self, number: int, site: str) -> int:
        """Correct where an operation is called; return the number of its call, 0 if unknown."""
        words = self._words
        at = _HEAD + (number & _MASK) * _ENTRY_WORDS
        call = words[at + 1]
        key = self._keys[call % RING_CALLS]
        if words[at] != number or key is None or self._calls[key] != call:
            return 0
        signature, group, size, known, way = key
        if known != site:
            words[at + 1] = call = self.intern(signature, group, size, site, way)
        return call

    def begin(self, call: int, sequence: int) -> int:
        """Note the start of a call; return its number, for `end`."""
        words = self._words
        words[0] = number = words[0] + 1
        at = _HEAD + (number & _MASK) * _ENTRY_WORDS
        # The number is written last, and 0 before: a peer that reads meanwhile skips the entry.
        words[at] = 0
        words[at + 1] = call
        words[at + 2] = sequence
        words[at + 4] = 0
        words[at + 5] = 0
        words[at + 3] = monotonic_ns()
        words[at] = number
        return number

    def end(self, number: int, outcome: int) -> None:
        """Note the end of a call, unless newer ones have taken its place."""
        words = self._words
        at = _HEAD + (number & _MASK) * _ENTRY_WORDS
        if words[at] == number:
            words[at + 5] = outcome
            words[at + 4] = monotonic_ns()

    def noted(self, steps: Steps, number: int) -> Steps:
        """Run an operation that was noted; note how it ends."""
        outcome = _FAILED
        try:
            result = yield from steps
            outcome = _DONE
            return result
        finally:
            self.end(number, outcome)

    @property
    def newest(self) -> int:
        """Return the number of the newest operation; 0 before the first."""
        return self._words[0]

    def entry(self, number: int) -> Entry | None:
        """Return an operation by its number, None where it is no longer kept."""
        return _read(self.memory, self.memory[:RING_BYTES].view(np.int64), number)

    def entries(self, last: int = RING_ENTRIES) -> tuple[Entry, ...]:
        """Return the last operations, the oldest first."""
        return entries_in(self.memory, last)


def group_within(group: str, part: str) -> str:
    """Return the name of a part of a group: both, or a digest between them where that is long.

    Other ranks look for a group's calls by its name, which has to fit a ring as it is.
    """
    name = f"{group}.{part}"
    if len(name) <= _NAME_BYTES:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{group[:16]}...{digest}.{part}"


def _encoded(key: _Key) -> bytes:
    """Write what a call is, the fields between tabs; a site that is too long loses its front."""
    signature, group, size, site, way = key
    fields = (*map(str, signature), _cut(group), str(size), _cut(way))
    head = b"".join(field.replace("\t", " ").encode(errors="replace") + b"\t" for field in fields)
    return (head + site.encode(errors="replace")[len(head) - _TEXT_BYTES :]).ljust(
        _TEXT_BYTES, b"\0"
    )


def _cut(name: str) -> str:
    return name.encode(errors="replace")[:_NAME_BYTES].decode(errors="ignore")


def entries_in(memory: Bytes, last: int = RING_ENTRIES) -> tuple[Entry, ...]:
    """Return the last operations from a ring's memory, a peer's too, the oldest first.

    Entries that are being written, and those whose call is no longer in the table, are left out.
    """
    words = memory[:RING_BYTES].view(np.int64)
    newest = int(words[RingWord.NEXT])
    found = (
        _read(memory, words, number) for number in range(max(1, newest - last + 1), newest + 1)
    )
    return tuple(entry for entry in found if entry is not None)


def _read(memory: Bytes, words: npt.NDArray[np.int64], number: int) -> Entry | None:
    at = RingWord.WORDS + (number & _MASK) * EntryWord.WORDS
    found, call, sequence, start, end, outcome, *_ = words[at : at + EntryWord.WORDS].tolist()
    low = RING_BYTES + call % RING_CALLS * _CALL_BYTES
    known = int(memory[low : low + 8].view(np.int64)[0])
    if found != number or known != call:
        return None
    text = memory[low + 8 : low + _CALL_BYTES].tobytes().rstrip(b"\0").decode(errors="ignore")
    operation, op, dtype, count, peer, group, size, way, site = text.split("\t", 8)
    signature = Signature(operation, op, dtype, int(count), int(peer))
    state = State(Outcome(outcome))
    return Entry(number, sequence, group, int(size), signature, site, start, end, state, way)


class Sites:
    """Where the user's program calls, as file:line; each place is looked up once."""

    def __init__(self) -> None:
        self._known: dict[tuple[CodeType, int], str] = {}

    def here(self) -> str:
        """Return the place of the innermost frame outside those packages."""
        frame = sys._getframe(1)
        while True:
            name = frame.f_globals.get("__name__", "")
            before = frame.f_back
            if name.partition(".")[0] not in _QUIET or before is None:
                break
            frame = before
        key = frame.f_code, frame.f_lasti
        site = self._known.get(key)
        if site is None:
            if len(self._known) >= RING_CALLS:
                self._known.clear()
            site = self._known[key] = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        return site
