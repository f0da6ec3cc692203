"""Note operations in a rank's ring from compiled code, as `comm.trace.Ring` does from Python."""

from __future__ import annotations

from typing import Any

from .native import nanoseconds, store, words_at
from .records import RING_BYTES, RING_ENTRIES, EntryWord, RingWord
from .scalars import compiled

_RING_WORDS, _HEAD = RING_BYTES // 8, int(RingWord.WORDS)
_NEXT, _CLOCK = int(RingWord.NEXT), int(RingWord.CLOCK)
_STARTS, _ENDS = int(RingWord.STARTS), int(RingWord.ENDS)
_MASK, _ENTRY_WORDS = RING_ENTRIES - 1, int(EntryWord.WORDS)
_NUMBER, _CALL, _SEQUENCE = map(int, (EntryWord.NUMBER, EntryWord.CALL, EntryWord.SEQUENCE))
_START, _END, _OUTCOME = map(int, (EntryWord.START, EntryWord.END, EntryWord.OUTCOME))


@compiled
def note_start(address: Any, call: Any, sequence: Any) -> Any:
    """Note in the ring at an address that a call begins; return the entry's number."""
    ring = words_at(address, _RING_WORDS)
    ring[_NEXT] += 1
    number = ring[_NEXT]
    at = _HEAD + (number & _MASK) * _ENTRY_WORDS
    # The number is written last, and 0 before: a peer that reads meanwhile skips the entry.
    store(address + 8 * at, 0)
    ring[at + _CALL] = call
    ring[at + _SEQUENCE] = sequence
    ring[at + _END] = 0
    ring[at + _OUTCOME] = 0
    ring[at + _START] = nanoseconds(ring[_CLOCK], ring[_STARTS])
    store(address + 8 * at, number)
    return number


@compiled
def note_end(address: Any, number: Any, outcome: Any) -> Any:
    """Note how it has ended, unless newer ones have taken its place."""
    ring = words_at(address, _RING_WORDS)
    at = _HEAD + (number & _MASK) * _ENTRY_WORDS
    if ring[at + _NUMBER] == number:
        ring[at + _OUTCOME] = outcome
        # A coarse clock may be behind the one of the start.
        ring[at + _END] = max(ring[at + _START], nanoseconds(ring[_CLOCK], ring[_ENDS]))
